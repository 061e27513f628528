# SPDX-License-Identifier: Apache-2.0
"""TIP: half of the tokens teach as much as all."""

from __future__ import annotations

from benchmarks.claims.claim import COLD_START, Arm, Claim, Metric, Teacher, at_end, largest, reached
from benchmarks.claims.report import Results, compare

GOAL = 0.6
TIP = {
    "class_path": "lit_rl.callbacks.TokenImportance",
    "init_args": {"keep": 0.5, "strategy": "soft_or"},
}

CLAIM = Claim(
    name="tip",
    title="TIP",
    sentence="Distilling on the half of the tokens that entropy and divergence call important is as good as on all of them, "
    "at a lower peak of memory.",
    source="arXiv 2604.14084",
    setup="On-policy distillation from the quickstart's policy after its 200 steps of GRPO, reverse KL, one completion of each of 32 problems a step; `half` keeps the most important half of each batch's tokens. With a vocabulary of 64 the distributions that are left "
    "out are too small to show in the memory of the process.",
    warm_start=COLD_START,
    teacher=Teacher(),
    configs=["configs/quickstart.yaml", "configs/methods/opd.yaml"],
    overrides={
        "model.init_args.teacher.init_args.path": "{teacher}",
        "model.init_args.divergence.beta": 1.0,
        "model.init_args.prompts_per_step": 32,
        "model.init_args.group_size": 1,
        "model.init_args.max_rollouts": 120,
        "trainer.val_check_interval": 5,
    },
    arms=[Arm("all"), Arm("half", overrides={"trainer.callbacks+": [TIP]})],
    metrics=[
        Metric(f"generated tokens to {GOAL}", reached("val/pass@1", GOAL, cost="rollout/tokens"), "lower"),
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric("peak memory of the process, GiB", largest("memory/peak_gib"), "lower"),
    ],
    curves=["val/pass@1", "rollout/length_mean"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    final, memory = "held-out pass@1 at the end", "peak memory of the process, GiB"
    return f"pass@1: {compare(results, 'all', 'half', final)}; memory: {compare(results, 'all', 'half', memory)}."
