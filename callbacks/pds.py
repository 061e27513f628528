# SPDX-License-Identifier: Apache-2.0
"""Predictive Dynamic Sampling: draw as many prompts at once as will probably be needed."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from lit_rl import distributed as ranks
from lit_rl.callbacks.signal import has_reward_variance
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts


class PredictiveDynamicSampling(RolloutCallback):
    r"""PDS (arXiv 2601.03969): fill the batch with groups that carry signal, in a single round of generation.

    From the pass rates :math:`p_s` (groups with reward variance over groups sampled) of the last H steps, the next step
    draws :math:`\lfloor B f \rfloor` prompts with
    :math:`f = \mathrm{clip}((1 + \mathrm{std}(p)) / \mathrm{mean}(p), f_{min}, f_{max})` (population deviation). Of the
    groups that carry signal the first B are trained on; fewer than B need no padding here, because losses are averaged
    over what is there.

    Args:
        history: H, steps that the prediction looks back on.
        first: factor of the first step.
        smallest: lower bound of the factor.
        largest: upper bound of the factor, also used when no group carried signal.
        enabled: False leaves the run untouched.
    """

    def __init__(
        self,
        history: int = 20,
        first: float = 1.5,
        smallest: float = 1.2,
        largest: float = 5.0,
        enabled: bool = True,
    ) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}.")
        if not 1 <= smallest <= largest:
            raise ValueError(f"1 <= smallest <= largest must hold, got smallest={smallest}, largest={largest}.")
        self.first, self.smallest, self.largest, self.enabled = first, smallest, largest, enabled
        self.rates: deque[float] = deque(maxlen=history)

    def factor(self) -> float:
        """How many times the wanted number of prompts the next step draws."""
        if not self.rates:
            return self.first
        mean = sum(self.rates) / len(self.rates)
        if mean == 0:
            return self.largest
        std = math.sqrt(sum((p - mean) ** 2 for p in self.rates) / len(self.rates))
        return min(max((1 + std) / mean, self.smallest), self.largest)

    def on_plan(self, trainer: Any, module: Any, prompts: int) -> int | None:
        """Draw more prompts than wanted; the count divides over the ranks."""
        if not self.enabled:
            return None
        # Rounding first keeps 10 x 1.2 from becoming 11 through binary fractions.
        return math.floor(round(prompts * ranks.world_size() * self.factor(), 9)) // ranks.world_size()

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Keep the first B groups that carry signal, counted over all ranks in drawing order."""
        if not self.enabled:
            return None
        useful = has_reward_variance(rollouts)
        counts = torch.tensor([int(useful.sum()), len(useful)], device=rollouts.device)
        per_rank = torch.cat(ranks.gather_ragged(counts[None]))
        before = int(per_rank[: ranks.rank(), 0].sum())
        position = torch.cumsum(useful.long(), 0) + before
        keep = useful & (position <= module.prompts_per_step)
        found, sampled = (int(x) for x in per_rank.sum(0))
        ledger = module.ledger
        ledger.mean("pds/factor", torch.tensor([self.factor()]))
        rate = found / sampled if sampled else 0.0
        self.rates.append(rate)
        ledger.mean("pds/pass_rate", torch.tensor([rate]))
        ledger.mean("pds/wasted", torch.tensor([max(0, found - module.prompts_per_step) / max(sampled, 1)]))
        return rollouts.select_groups(keep)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = deque(state_dict["rates"], maxlen=self.rates.maxlen)
