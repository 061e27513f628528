# SPDX-License-Identifier: Apache-2.0
"""OPD: a dense signal from a teacher teaches with fewer generated tokens than a sparse reward."""

from __future__ import annotations

from benchmarks.claims.claim import COLD_START, Arm, Claim, Metric, Teacher, at_end, reached
from benchmarks.claims.report import Results, compare

GOAL = 0.6

CLAIM = Claim(
    name="opd",
    title="On-policy distillation",
    sentence="Scoring every token of its own completions by a stronger teacher brings a student to a given accuracy with "
    "far fewer generated tokens than reinforcement learning from a verifiable reward.",
    source="GKD, arXiv 2306.13649",
    setup="A cold start (a third of the quickstart's warm start). The teacher has the student's size: the quickstart's own "
    "policy after its 200 steps of GRPO. `opd` samples one completion of each of 32 problems a step and minimises the "
    "Jensen-Shannon divergence to the teacher; `grpo` samples 8 of each of 16. What the teacher cost to train is not "
    "counted.",
    warm_start=COLD_START,
    teacher=Teacher(),
    overrides={"model.init_args.max_rollouts": 120, "trainer.val_check_interval": 5},
    arms=[
        Arm("grpo"),
        Arm(
            "opd",
            configs=["configs/methods/opd.yaml"],
            overrides={
                "model.init_args.teacher.init_args.path": "{teacher}",
                "model.init_args.prompts_per_step": 32,
                "model.init_args.group_size": 1,
            },
        ),
    ],
    metrics=[
        Metric(f"generated tokens to {GOAL}", reached("val/pass@1", GOAL, cost="rollout/tokens"), "lower"),
        Metric(f"training steps to {GOAL}", reached("val/pass@1", GOAL), "lower"),
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
    ],
    curves=["val/pass@1", "rollout/length_mean"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    tokens = compare(results, "grpo", "opd", f"generated tokens to {GOAL}")
    final = compare(results, "grpo", "opd", "held-out pass@1 at the end")
    return f"Generated tokens to {GOAL}: {tokens}. At the end: {final}."
