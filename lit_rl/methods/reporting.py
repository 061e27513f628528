# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step: collected where they arise, reduced over ranks once, logged in one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_rl.distributed import all_max, all_sum, union_of_names
from lit_rl.methods.terms import Signals
from lit_rl.rollouts import Rollouts, StopReason


class Ledger:
    """Sums, maxima and seconds of one training step.

    The ranks may have measured different things: names are matched before they are reduced.
    """

    def __init__(self) -> None:
        self.signals = Signals()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time spent inside to ``time/<name>``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Add values (those at ``where``) to the mean logged as ``name``; NaN values are left out."""
        valid = ~torch.isnan(values) if values.is_floating_point() else torch.ones_like(values, dtype=torch.bool)
        self.signals.mean(name, values, valid if where is None else valid & where)

    def total(self, name: str, value: float | Tensor) -> None:
        """Add to the sum over ranks logged as ``name``."""
        old = self.signals.sums.get(name, (torch.zeros(()), torch.zeros(())))[0]
        self.signals.sums[name] = (
            old + torch.as_tensor(value, dtype=torch.float32, device=old.device),
            torch.tensor(-1.0),
        )

    def largest(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Let values compete for the maximum logged as ``name``."""
        valid = torch.ones_like(values, dtype=torch.bool) if where is None else where
        self.signals.largest(name, values, valid)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Everything as plain numbers, the same on every rank: one sum and one maximum over the ranks."""
        empty = (torch.zeros(()), torch.zeros(()))
        names = union_of_names(self.signals.sums)
        entries = [self.signals.sums.get(name, empty) for name in names]
        packed = torch.tensor([[float(x), float(n)] for x, n in entries], dtype=torch.float64).reshape(-1, 2)
        packed = all_sum(packed.to(device)).cpu()
        peaks = {f"time/{k}": v for k, v in self.seconds.items()}
        peaks |= {k: float(v) for k, v in self.signals.maxima.items()}
        peak_names = union_of_names(peaks)
        highest = torch.tensor([peaks.get(name, -torch.inf) for name in peak_names], dtype=torch.float64)
        highest = all_max(highest.to(device)).cpu()
        out = {n: t if c < 0 else t / c for n, (t, c) in zip(names, packed.tolist()) if c}
        out.update(zip(peak_names, highest.tolist()))
        return out


def rollout_statistics(rollouts: Rollouts, ledger: Ledger) -> None:
    """Record what a batch looks like after every hook has run: rewards, lengths, ends, signal."""
    rewards = rollouts.rewards
    ledger.mean("reward/mean", rewards)
    ledger.mean("_reward_square", rewards.square())
    for name, values in rollouts.reward_terms.items():
        ledger.mean(f"reward/{name}", values, rollouts.reward_weights[name] != 0)
    ledger.mean("rollout/correct_ratio", rollouts.correct)
    ledger.mean("rollout/unscorable_ratio", torch.isnan(rewards).float())
    generated = rollouts.generated.float()
    ledger.mean("rollout/length_mean", generated)
    ledger.mean("rollout/kept_length_mean", rollouts.lengths.float())
    ledger.mean("rollout/truncated_ratio", (rollouts.row["stop_reason"] == StopReason.LENGTH).float())
    ledger.mean("rollout/zero_signal_ratio", zero_signal(rollouts).float())
    if "entropy" in rollouts.token:
        ledger.mean("policy/entropy", rollouts.token["entropy"], rollouts.completion_mask)
    ledger.total("rollout/completions", float(len(rollouts)))
    ledger.total("rollout/tokens", generated.sum())


def zero_signal(rollouts: Rollouts) -> Tensor:
    """``[B]`` bool: groups whose advantages are all zero, so that they teach nothing."""
    has_signal = (rollouts.advantages != 0).any(1) if rollouts.width else torch.zeros(len(rollouts), dtype=torch.bool)
    count = torch.zeros(len(rollouts.prompts), dtype=torch.long, device=rollouts.device)
    return count.index_add(0, rollouts.group, has_signal.long()) == 0
