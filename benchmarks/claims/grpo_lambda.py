# SPDX-License-Identifier: Apache-2.0
"""GRPO-λ: the length penalty where the policy is able, without the collapse of a static one."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end, collapsed, smallest, total
from benchmarks.claims.forced_length import forced_length_section
from benchmarks.claims.report import Results, compare

PENALTY = "lit_rl.callbacks.GRPOLambda"

CLAIM = Claim(
    name="grpo_lambda",
    title="GRPO-λ",
    sentence="A length penalty on the best-solved groups alone shortens completions much as a static penalty does, and "
    "the static penalty's collapse of accuracy does not happen.",
    source="arXiv 2505.18086",
    setup="A cold start (half of the quickstart's warm start), so that many groups are all wrong at first, from a teacher who states "
    "every other column twice, so that there is length to save. Two static penalties stand beside GRPO-λ (λ = 0.2, α = 0.6). "
    "`static` is the paper's: the same penalty in every group, on correct completions only, which is λ = 1. `static-all` "
    "rewards every completion for being short, right or wrong, as length rewards in general do.",
    warm_start=WarmStart(
        overrides={
            "model.init_args.max_rollouts": 300,
            "model.init_args.scheduler.init_args.total": 300,
            "data.init_args.verbose": 0.5,
        }
    ),
    overrides={"model.init_args.max_rollouts": 120, "trainer.val_check_interval": 10},
    arms=[
        Arm("grpo"),
        Arm(
            "static-all",
            overrides={
                "model.init_args.rewards+": [
                    {
                        "class_path": "lit_rl.rewards.LengthReward",
                        "init_args": {"start": 0.0, "end": -0.6, "max_length": 40},
                    }
                ]
            },
        ),
        Arm(
            "static",
            overrides={"trainer.callbacks+": [{"class_path": PENALTY, "init_args": {"fraction": 1.0}}]},
        ),
        Arm(
            "lambda",
            overrides={"trainer.callbacks+": [{"class_path": PENALTY, "init_args": {"fraction": 0.2}}]},
        ),
    ],
    metrics=[
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("runs that collapsed (end below half of their best)", collapsed("val/pass@1"), "lower", counts=True),
        Metric("lowest held-out pass@1", smallest("val/pass@1"), "higher"),
        Metric("tokens a held-out completion at the end", at_end("val/length_mean", over=3), "lower"),
        Metric("generated tokens, whole run", total("rollout/tokens"), "lower"),
    ],
    curves=["val/pass@1", "val/length_mean", "rollout/correct_ratio"],
    extra=forced_length_section,
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    end, collapses, _, length, _ = (m.label for m in results.claim.metrics)
    fallen = {arm: int(sum(results.values(arm, collapses))) for arm in results.runs}
    count = ", ".join(f"{arm} {fallen[arm]} of {len(results.seeds)} runs" for arm in ("static-all", "static", "lambda"))
    static = (
        "The collapse of the paper's own static penalty shows here, too."
        if fallen["static"]
        else "That the paper's own static penalty collapses does not show here: under it a right completion stays worth more "
        "than a wrong one, which is enough for runs of this length. What collapses is a penalty that wrong completions can "
        "escape by being short."
    )
    return (
        f"Length against grpo: static {compare(results, 'grpo', 'static', length)}; lambda "
        f"{compare(results, 'grpo', 'lambda', length)}. Accuracy: static {compare(results, 'grpo', 'static', end)}; lambda "
        f"{compare(results, 'grpo', 'lambda', end)}. Collapsed: {count}. {static}"
    )
