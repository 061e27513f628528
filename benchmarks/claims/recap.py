# SPDX-License-Identifier: Apache-2.0
"""RECAP: learn one task by reinforcement and keep another by replay, with weights that follow both."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, WarmStart, at_end
from benchmarks.claims.report import Results, compare, seeds_higher

CONFIGS = "benchmarks/claims/configs"
SEEDED = {"data.init_args.sources.addition.init_args.seed": "{seed}"}

CLAIM = Claim(
    name="recap",
    title="RECAP",
    sentence="Replay keeps a task that reinforcement learning on another one forgets, and weighing the objectives by how "
    "fast and how steadily they improve learns the new task no worse than uniform mixing.",
    source="arXiv 2510.21978",
    setup="The warm-started policy knows two tasks: additions, from a careless teacher who forgets a carry in nearly every "
    "first pass, and additions without carries (`57:68=`), from an exact one. The right solution of the second is what "
    "must be unlearned for the first. Additions are then learned by reward. `reasoning-only` never sees the other task "
    "again, `uniform` replays it in half of the prompts through a likelihood term, `recap` weighs the reward and that "
    "term.",
    warm_start=WarmStart(("configs/quickstart-warmup.yaml", f"{CONFIGS}/recap-warmup.yaml")),
    overrides={
        "model.init_args.max_rollouts": 120,
        "model.init_args.optimizer.init_args.lr": 4e-4,
        "trainer.val_check_interval": 20,
    },
    arms=[
        Arm("reasoning-only", [f"{CONFIGS}/recap-reasoning-only.yaml"], SEEDED),
        Arm("uniform", [f"{CONFIGS}/recap-mixed.yaml"], SEEDED),
        Arm("recap", [f"{CONFIGS}/recap-mixed.yaml", f"{CONFIGS}/recap-weighted.yaml"], SEEDED),
    ],
    metrics=[
        Metric("pass@1 of the task to be kept, end", at_end("val/carryless/pass@1", over=3), "higher"),
        Metric("pass@1 of the task to be learned, end", at_end("val/addition/pass@1", over=3), "higher"),
    ],
    curves=["val/carryless/pass@1", "val/addition/pass@1"],
    tried=[
        "subtractions in the same style, by as careless a teacher: 0.40 at the end without replay, 0.41 with it; "
        "learning to carry does not hurt borrowing, so nothing was forgotten (and half of the batch for replay cost "
        "0.06 of the additions' accuracy)",
        "reversing a number: not forgotten either",
    ],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    kept, learned = (m.label for m in results.claim.metrics)
    return (
        f"Task to be kept, against reasoning-only: uniform {compare(results, 'reasoning-only', 'uniform', kept)} "
        f"({seeds_higher(results, 'reasoning-only', 'uniform', kept)}); recap "
        f"{compare(results, 'reasoning-only', 'recap', kept)} "
        f"({seeds_higher(results, 'reasoning-only', 'recap', kept)}). Task to be learned, against reasoning-only: uniform "
        f"{compare(results, 'reasoning-only', 'uniform', learned)}; recap "
        f"{compare(results, 'reasoning-only', 'recap', learned)}; recap against uniform: "
        f"{compare(results, 'uniform', 'recap', learned)}."
    )
