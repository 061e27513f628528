# SPDX-License-Identifier: Apache-2.0
"""NPO and AutoNPO: a later self helps an earlier one."""

from __future__ import annotations

from benchmarks.claims.claim import COLD_START, Arm, Claim, Metric, at_end, reached
from benchmarks.claims.report import Results, compare

GOAL = 0.8

CLAIM = Claim(
    name="npo",
    title="NPO and AutoNPO",
    sentence="Going back and letting a slightly later policy put one verified completion into each hard group reaches a "
    "given accuracy in fewer steps from a cold start, or ends higher.",
    source="arXiv 2604.20733",
    setup="A cold start: the warm start has a third of the quickstart's steps, so that most groups are all wrong at first. "
    "`npo` trains 30 steps ahead, goes back to the start and replays them with its guide; `autonpo` decides by itself. "
    "Steps of the final trajectory are `rollout_step`; trained steps and generated tokens count everything, the abandoned "
    "segment and the guide's samples included.",
    warm_start=COLD_START,
    overrides={"model.init_args.max_rollouts": 200, "trainer.val_check_interval": 10},
    arms=[
        Arm("grpo"),
        Arm(
            "npo",
            overrides={
                "trainer.callbacks+": [
                    {"class_path": "lit_rl.callbacks.NPOSchedule", "init_args": {"start": 0, "end": 30}}
                ]
            },
        ),
        Arm(
            "autonpo",
            overrides={
                "trainer.callbacks+": [
                    {
                        "class_path": "lit_rl.callbacks.AutoNPO",
                        "init_args": {"distances": [10, 20, 30, 40], "window": 20, "reward_gain": 0.02},
                    }
                ]
            },
        ),
    ],
    metrics=[
        Metric(f"steps of the final trajectory to {GOAL}", reached("val/pass@1", GOAL, clock="rollout_step"), "lower"),
        Metric(f"trained steps to {GOAL}", reached("val/pass@1", GOAL), "lower"),
        Metric(f"generated tokens to {GOAL}", reached("val/pass@1", GOAL, cost="rollout/tokens"), "lower"),
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
    ],
    curves=["val/pass@1", "rollout_step", "policy/entropy"],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    steps, final = f"steps of the final trajectory to {GOAL}", "held-out pass@1 at the end"
    parts = [
        f"{arm}: {compare(results, 'grpo', arm, steps)} in steps, {compare(results, 'grpo', arm, final)} in pass@1"
        for arm in ("npo", "autonpo")
    ]
    return "; ".join(parts) + "."
