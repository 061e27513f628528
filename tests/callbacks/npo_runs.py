# SPDX-License-Identifier: Apache-2.0
"""Toy runs that rewind, and callbacks that watch them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lit_rl.hooks import RolloutCallback
from lit_rl.policies import Snapshot
from lit_rl.rewards import FunctionReward, RewardInput
from lit_rl.rollouts import Rollouts
from lit_rl.schedules import WarmupLinear
from lit_rl.testing import make_module, toy_reward
from lit_rl.testing.toys import starts_with_digit


def starts_alike(batch: RewardInput) -> list[float]:
    """1 if the completion starts with a character as even or odd as the answer: a coin toss for a random policy."""
    pairs = zip(batch.completions, batch.columns["answer"])
    return [float(len(text) > 0 and ord(text[0]) % 2 == int(answer) % 2) for text, answer in pairs]


def nothing_is_right(batch: RewardInput) -> list[float]:
    return [0.0] * len(batch.completions)


def warmup(optimizer: torch.optim.Optimizer) -> WarmupLinear:
    return WarmupLinear(optimizer, warmup=3, total=40)


def guided_module(policy: Path, **options: Any) -> Any:
    """Learns to answer with an even or an odd character, with groups that fail now and then."""
    answer = FunctionReward(starts_alike, name="answer", verifier=True, columns=["answer"])
    return make_module(policy, **({"rewards": [answer], "max_rollouts": 5} | options))


def hopeless_module(policy: Path, **options: Any) -> Any:
    """Learns from one reward while the verifier never finds anything right; with everything that a rewind restores."""
    defaults: dict[str, Any] = {
        "rewards": [toy_reward_without_verdict(), FunctionReward(nothing_is_right, name="never", verifier=True)],
        "max_rollouts": 4,
        "updates_per_rollout": 2,
        "scheduler": warmup,
        "reference": Snapshot(every=2),
        "kl_coef": 0.05,
    }
    return make_module(policy, **(defaults | options))


def toy_reward_without_verdict() -> Any:
    reward = toy_reward()
    return FunctionReward(starts_with_digit, name=reward.name)


class Diary(RolloutCallback):
    """What each training step started from and trained on. It remembers across rewinds."""

    rewinds = False

    def __init__(self) -> None:
        self.clocks: list[int] = []
        self.steps: list[int] = []
        self.cursors: list[int] = []
        self.batches: list[Rollouts] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        self.references: list[Any] = []

    def on_advantages(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        self.clocks.append(module.clock)
        self.steps.append(module.rollout_step)
        self.cursors.append(module.cursor)
        self.batches.append(rollouts.clone())
        self.weights.append({n: p.detach().clone() for n, p in module.model.named_parameters()})
        self.rates.append(module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])
        self.references.append(None if module.reference is None else module.reference.identity())


class Numbers(Callback):
    """Everything that was logged, by clock; list it last."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.logged[pl_module.clock - 1] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    def series(self, name: str) -> list[float]:
        return [numbers[name] for _, numbers in sorted(self.logged.items()) if name in numbers]


def same_tokens(first: Rollouts, second: Rollouts) -> bool:
    """Whether two batches hold the same prompts and completions."""
    same_prompts = torch.equal(first.prompts.draw, second.prompts.draw)
    return same_prompts and first.width == second.width and torch.equal(first.completion_ids, second.completion_ids)


def guides(batches: Sequence[Rollouts]) -> list[int]:
    """Number of guide rows in each batch."""
    return [int((batch.origin == 1).sum()) for batch in batches]


class Slow(Callback):
    """Slows steps down, so that whoever kills the run meets it at work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        time.sleep(self.seconds)
