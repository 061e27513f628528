# SPDX-License-Identifier: Apache-2.0
"""Hand-made batches, and the part of a method that callbacks see of it, so that hooks can be called without a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.reporting import Ledger
from lit_rl.objectives import AdvantageNormalizer
from lit_rl.rewards import FunctionReward
from lit_rl.rollouts import Origin, Prompts, Rollouts
from lit_rl.samplers import HFSampler

NAN = math.nan


def prompts(draws: Sequence[int], source: Sequence[str] | None = None) -> Prompts:
    """One prompt for each draw."""
    return Prompts(
        ids=[torch.tensor([1, 2]) for _ in draws],
        text=["1+2=" for _ in draws],
        uid=torch.tensor(draws),
        draw=torch.tensor(draws),
        source=list(source or ["toy"] * len(draws)),
    )


def batch(
    lengths: Sequence[Sequence[int]],
    correct: Sequence[Sequence[float]],
    *,
    draws: Sequence[int] | None = None,
    source: Sequence[str] | None = None,
    origin: Origin = Origin.POLICY,
    weight: float = 1.0,
) -> Rollouts:
    """A scored batch from lengths and verdicts, one list a group. The reward is the verdict."""
    group = torch.tensor([g for g, members in enumerate(lengths) for _ in members], dtype=torch.long)
    flat = [n for members in lengths for n in members]
    ids = [torch.arange(1, n + 1) for n in flat]
    rollouts = Rollouts.build(
        prompts(list(draws) if draws is not None else list(range(len(lengths))), source),
        group,
        ids,
        sampler_logprobs=[torch.full((n,), -1.0) for n in flat],
        origin=origin,
    )
    rollouts.correct = torch.tensor([z for members in correct for z in members])
    rollouts.reward_terms["exact"] = rollouts.correct.clone()
    rollouts.reward_weights["exact"] = torch.full((len(flat),), weight)
    return rollouts


def add_demonstrations(rollouts: Rollouts, lengths: Sequence[int], verdict: float = NAN) -> Rollouts:
    """The batch with groups of one demonstration behind it, whose draws follow."""
    first = int(rollouts.prompts.draw.max()) + 1 if len(rollouts.prompts) else 0
    rows = batch(
        [[n] for n in lengths],
        [[verdict] for _ in lengths],
        draws=range(first, first + len(lengths)),
        source=["replay"] * len(lengths),
        origin=Origin.DEMONSTRATION,
        weight=0.0 if math.isnan(verdict) else 1.0,
    )
    del rows.token["logprobs.sampler"]  # nobody sampled them
    return Rollouts.cat([rollouts, rows])


class Module(SimpleNamespace):
    """What callbacks see of a method. The verifier wants the whole completion: one that was cut is wrong."""

    def __init__(self, callbacks: Sequence[Any] = (), **options: Any) -> None:
        reward = FunctionReward(lambda rows: [0.0] * len(rows), name="exact", verifier=True)
        defaults: dict[str, Any] = {
            "group_size": 16,
            "prompts_per_step": 4,
            "rewards": [reward],
            "rollout_step": 0,
            "loss_terms": [],
            "max_rollouts": 100,
            "keep_entropy": True,
            "advantage": AdvantageNormalizer(),
            "sampler": HFSampler(),
            "device": torch.device("cpu"),
        }
        super().__init__(**{**defaults, **options})
        self.trainer = SimpleNamespace(callbacks=list(callbacks), should_stop=False)
        self.ledger, self.logged, self.rescored = Ledger(), {}, []

    def rescore(self, rollouts: Rollouts, rows: Tensor) -> None:
        """Score rows again in place, as a verifier that reads the last token would."""
        self.rescored += rows.tolist()
        whole = rollouts.lengths == rollouts.generated
        for name in ("correct", "reward_terms.exact"):
            values = rollouts.row[name].clone()
            values[rows] = torch.where(whole[rows], values[rows], 0.0)
            rollouts.row[name] = values

    def log(self, name: str, value: float) -> None:
        """Keep a number."""
        self.logged[name] = value

    def log_dict(self, numbers: dict[str, float]) -> None:
        """Keep numbers."""
        self.logged.update(numbers)

    def numbers(self) -> dict[str, float]:
        """Everything that was recorded or logged."""
        return self.ledger.reduce(self.device) | self.logged


def grpo_advantages(rewards: Tensor, group: Tensor, ddof: int = 1) -> Tensor:
    """Group-normalised advantages as a plain loop: ``[N]``."""
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for g in set(group.tolist()):
        rows = [i for i, other in enumerate(group.tolist()) if other == g]
        values = [float(rewards[i]) for i in rows]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))
        for i, v in zip(rows, values):
            out[i] = (v - mean) / (std + 1e-6)
    return out
