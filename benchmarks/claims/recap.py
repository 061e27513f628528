# SPDX-License-Identifier: Apache-2.0
"""RECAP: learn one task by reinforcement and keep another by replay, with weights that follow both."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end
from benchmarks.claims.report import Results, compare

CONFIGS = "benchmarks/claims/configs"
SEEDED = {"data.init_args.sources.addition.init_args.seed": "{seed}"}

CLAIM = Claim(
    name="recap",
    title="RECAP",
    sentence="Replay keeps a task that reinforcement learning on another one forgets, and weighing the objectives by how "
    "fast and how steadily they improve learns the new task no worse than uniform mixing.",
    source="arXiv 2510.21978",
    setup="The warm-started policy knows two tasks, additions and subtractions, each taught by a "
    "careless teacher. Additions are then learned by reward. `reasoning-only` never sees the other task again, `uniform` replays "
    "it in half of the prompts through a likelihood term, `recap` weighs the reward and that term.",
    warm_start=WarmStart(("configs/quickstart-warmup.yaml", f"{CONFIGS}/recap-warmup.yaml")),
    overrides={
        "model.init_args.max_rollouts": 240,
        "model.init_args.optimizer.init_args.lr": 2e-4,
        "trainer.val_check_interval": 20,
    },
    arms=[
        Arm("reasoning-only", [f"{CONFIGS}/recap-reasoning-only.yaml"], SEEDED),
        Arm("uniform", [f"{CONFIGS}/recap-mixed.yaml"], SEEDED),
        Arm("recap", [f"{CONFIGS}/recap-mixed.yaml", f"{CONFIGS}/recap-weighted.yaml"], SEEDED),
    ],
    metrics=[
        Metric("pass@1 of the task to be kept, end", at_end("val/subtraction/pass@1", over=3), "higher"),
        Metric("pass@1 of the task to be learned, end", at_end("val/addition/pass@1", over=3), "higher"),
    ],
    curves=["val/subtraction/pass@1", "val/addition/pass@1"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    kept = compare(results, "reasoning-only", "recap", "pass@1 of the task to be kept, end")
    learned = compare(results, "uniform", "recap", "pass@1 of the task to be learned, end")
    return (
        f"Task to be kept, recap against reasoning-only: {kept}. Task to be learned, recap against uniform: {learned}."
    )
