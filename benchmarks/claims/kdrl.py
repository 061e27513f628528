# SPDX-License-Identifier: Apache-2.0
"""KDRL: a teacher's signal and a reward together beat either alone."""

from __future__ import annotations

from benchmarks.claims.claim import COLD_START, Arm, Claim, Metric, at_end, reached
from benchmarks.claims.report import Results, compare
from benchmarks.claims.teachers import HALF_TRAINED, teacher_score

GOAL = 0.6
TAUGHT = {"model.init_args.teacher.init_args.path": "{teacher}", "model.init_args.group_size": 8}

CLAIM = Claim(
    name="kdrl",
    title="KDRL",
    sentence="Reward and teacher in one step learn faster than the reward alone and end higher than the teacher's signal "
    "alone.",
    source="arXiv 2506.02208",
    setup="A cold start, where rewards are rare, and a teacher that is better than the student and far from perfect, so that "
    "imitation cannot go beyond its level. `kd` is a teacher's term alone (OPD with the reverse KL over the vocabulary), "
    "`rl` is GRPO, `kdrl` both. All sample 8 completions of 16 problems a step. The coefficient of "
    "the teacher's term is annealed from 0.1 to 0.002 in 80 steps: the paper's 0.005 belongs to its model and learning rate.",
    warm_start=COLD_START,
    teacher=HALF_TRAINED,
    overrides={"model.init_args.max_rollouts": 120, "trainer.val_check_interval": 10},
    arms=[
        Arm("rl"),
        Arm(
            "kd",
            configs=["configs/methods/opd.yaml"],
            overrides={**TAUGHT, "model.init_args.divergence.beta": 1.0},
        ),
        Arm(
            "kdrl",
            configs=["benchmarks/claims/configs/kdrl-annealed.yaml"],
            overrides=TAUGHT,
        ),
    ],
    metrics=[
        Metric(f"generated tokens to {GOAL}", reached("val/pass@1", GOAL, cost="rollout/tokens"), "lower"),
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
    ],
    curves=["val/pass@1", "rollout/length_mean", "policy/entropy"],
    extra=teacher_score,
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    tokens, final = f"generated tokens to {GOAL}", "held-out pass@1 at the end"
    return (
        f"kdrl against rl: {compare(results, 'rl', 'kdrl', tokens)} in tokens, {compare(results, 'rl', 'kdrl', final)} in "
        f"pass@1; against kd: {compare(results, 'kd', 'kdrl', final)} in pass@1."
    )
