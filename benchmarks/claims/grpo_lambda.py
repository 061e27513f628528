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
    "every other column twice, so that there is length to save. Two static "
    "penalties stand beside GRPO-λ (λ = 0.2, α = 0.6): `static-all` rewards every completion for being short, right or wrong, "
    "as length rewards in general do; `static` is GRPO-λ with λ = 1, which penalises correct completions in every group.",
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
    length = compare(results, "grpo", "lambda", "tokens a held-out completion at the end")
    collapse = compare(results, "grpo", "static-all", "held-out pass@1 at the end")
    static = compare(results, "grpo", "static", "held-out pass@1 at the end")
    accuracy = compare(results, "grpo", "lambda", "held-out pass@1 at the end")
    return f"Length, lambda against grpo: {length}. Accuracy, static-all: {collapse}; static: {static}; lambda: {accuracy}."
