# SPDX-License-Identifier: Apache-2.0
"""ExOPD: a reward scale above 1 goes beyond the teacher."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, at_end, largest
from benchmarks.claims.report import Results, compare
from benchmarks.claims.teachers import HALF_TRAINED, teacher_score

CLAIM = Claim(
    name="gopd",
    title="ExOPD",
    sentence="A reward scale of 1.25 takes the student beyond its teacher, where plain on-policy distillation (1) ends at it.",
    source="arXiv 2602.12125",
    setup="The teacher is the student's own warm start after 12 steps of GRPO, the reference that warm start, so that their "
    "difference is what reinforcement learning has taught so far. Everything else is the paper's: one completion a prompt, "
    "PPO clip with dual clip, importance weights of at most 5.",
    teacher=HALF_TRAINED,
    configs=["configs/quickstart.yaml", "configs/methods/gopd.yaml"],
    overrides={
        "model.init_args.teacher.init_args.path": "{teacher}",
        "model.init_args.prompts_per_step": 64,
        "model.init_args.max_rollouts": 80,
        "trainer.val_check_interval": 10,
    },
    arms=[
        Arm("scale-1", overrides={"model.init_args.reward_scale": 1.0}),
        Arm("scale-1.25", overrides={"model.init_args.reward_scale": 1.25}),
    ],
    metrics=[
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("highest held-out pass@1", largest("val/pass@1"), "higher"),
        Metric("tokens a held-out completion at the end", at_end("val/length_mean", over=3), "lower"),
    ],
    curves=["val/pass@1", "rollout/length_mean", "policy/entropy"],
    extra=teacher_score,
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    final = "held-out pass@1 at the end"
    return f"pass@1 at the end against scale 1: {compare(results, 'scale-1', 'scale-1.25', final)}."
