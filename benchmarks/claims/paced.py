# SPDX-License-Identifier: Apache-2.0
"""PACED: distil at the frontier of what the student can do."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end, reached
from benchmarks.claims.privileged import SHOWN
from benchmarks.claims.report import Results, compare

CONFIGS = "benchmarks/claims/configs"
GOAL = 0.8


def weighing(power: float) -> dict[str, Any]:
    """The callback with both exponents alike; next to 0 it is the filter of what is always or never solved."""
    callback = {"class_path": "lit_rl.callbacks.PACED", "init_args": {"alpha": power, "beta": power}}
    return {"trainer.callbacks+": [callback]}


CLAIM = Claim(
    name="paced",
    title="PACED",
    sentence="Weighing each prompt's distillation loss by p (1 - p), p its pass rate, beats uniform weights.",
    source="arXiv 2603.11178",
    setup="Self-distillation with the reverse KL: the teacher is the initial policy with the answer in view, which the warm "
    "start has taught to work carefully where it sees the answer. Half of the problems are those of the warm start (two or "
    "three digits), on which the student is held out; half have five or six digits, which student and teacher have never seen, so that "
    "what the teacher says about them is noise. 8 completions of 16 problems a step. `filter` keeps what is sometimes solved and "
    "weighs it alike (α = β = 1e-6).",
    warm_start=WarmStart(
        ("configs/quickstart-warmup.yaml", f"{CONFIGS}/privileged-warmup.yaml"),
        overrides={"data.init_args.skips": 0.0},
    ),
    configs=["configs/quickstart.yaml", "configs/methods/opsd.yaml", f"{CONFIGS}/paced.yaml"],
    overrides={
        "model.init_args.prompt.template": SHOWN,
        "model.init_args.divergence.entry_clip": None,
        "model.init_args.divergence.beta": 1.0,
        "model.init_args.group_size": 8,
        "model.init_args.max_rollouts": 60,
        "trainer.val_check_interval": 2,
        "data.init_args.sources.familiar.init_args.seed": "{seed}",
        "data.init_args.sources.beyond.init_args.seed": "{seed}",
    },
    arms=[Arm("uniform"), Arm("filter", overrides=weighing(1e-6)), Arm("paced", overrides=weighing(1.0))],
    metrics=[
        Metric(f"training steps to {GOAL}", reached("val/pass@1", GOAL), "lower"),
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("mean held-out pass@1 of the run", at_end("val/pass@1", over=30), "higher"),
    ],
    curves=["val/pass@1", "rollout/length_mean", "distill/divergence"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    steps, final, mean = (m.label for m in results.claim.metrics)
    return (
        f"paced against uniform: steps to {GOAL} {compare(results, 'uniform', 'paced', steps)}, pass@1 of the whole run "
        f"{compare(results, 'uniform', 'paced', mean)}, at the end {compare(results, 'uniform', 'paced', final)}. Against the "
        f"filter: {compare(results, 'filter', 'paced', mean)} over the run, {compare(results, 'filter', 'paced', final)} at the end."
    )
