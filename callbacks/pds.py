# SPDX-License-Identifier: Apache-2.0
"""Predictive dynamic sampling: draw as many prompts at once as will probably be needed."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from lit_rl import distributed as ranks
from lit_rl.callbacks.signal import GroupFilter, carries_signal
from lit_rl.rollouts import Rollouts


class PredictiveDynamicSampling(GroupFilter):
    r"""PDS (arXiv 2601.03969): fill the batch with groups that carry signal, in a single round of generation.

    From the pass rates :math:`p_s` (groups with reward variance over groups sampled) of the last H steps, the next step
    draws :math:`\lfloor B f \rfloor` prompts with
    :math:`f = \mathrm{clip}((1 + \mathrm{std}(p)) / \mathrm{mean}(p), f_{min}, f_{max})` (population deviation). Of the
    groups that carry signal the first B in drawing order, over all ranks, are trained on. Where there are fewer the
    paper pads with copies of zero weight; here losses are averaged over what is there, which is the same.

    Groups are dropped when the whole batch is ready, so everything that changes rewards or groups in ``on_rewards``
    comes before. Demonstrations and replayed text count as groups with signal.

    Logged: ``pds/factor`` (f of this step), ``pds/pass_rate`` (:math:`p_s`) and ``pds/wasted`` (groups with signal
    beyond B, as a share of those sampled).

    Args:
        history: H, steps that the prediction looks back on.
        first: factor of the first step.
        smallest: lower bound of the factor.
        largest: upper bound of the factor, also used when no group carried signal.
        enabled: False leaves the run untouched.

    The defaults are the paper's.
    """

    filters_in = "on_batch_ready"

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
        if first < 1:
            raise ValueError(f"first must be at least 1, or the first batch is never full, got {first}.")
        self.first, self.smallest, self.largest, self.enabled = first, smallest, largest, enabled
        self.rates: deque[float] = deque(maxlen=history)

    def check_setup(self, module: Any) -> None:
        """Refuse a second callback that decides how many prompts are drawn."""
        others = [c for c in module.trainer.callbacks if isinstance(c, GroupFilter) and c is not self and c.enabled]
        if self.enabled and others:
            raise ValueError(
                f"PredictiveDynamicSampling draws once what the batch will need, {type(others[0]).__name__} refills it "
                "in rounds: use one of them."
            )

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
        """Draw more prompts than wanted; every rank draws equally many."""
        if not self.enabled:
            return None
        # Rounding first: a factor of 2.2 may be 2.1999… in binary, and ten prompts must become 22.
        return math.floor(round(module.prompts_per_step * self.factor(), 9)) // ranks.world_size()

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Keep the first B groups that carry signal, and remember how many there were."""
        if not self.enabled:
            return None
        useful = carries_signal(rollouts)  # [B]
        counts = torch.tensor([[int(useful.sum()), len(useful)]], device=rollouts.device)
        everywhere = torch.cat(ranks.gather_ragged(counts))  # [ranks, 2]
        found, drawn = everywhere.sum(0).tolist()
        position = useful.long().cumsum(0) + everywhere[: ranks.rank(), 0].sum()
        keep = useful & (position <= module.prompts_per_step)
        for name, value in (
            ("pds/factor", self.factor()),
            ("pds/pass_rate", found / max(drawn, 1)),
            ("pds/wasted", max(0, found - module.prompts_per_step) / max(drawn, 1)),
        ):
            module.ledger.mean(name, torch.tensor([value]))
        self.rates.append(found / max(drawn, 1))
        return rollouts.select_groups(keep)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = deque(state_dict["rates"], maxlen=self.rates.maxlen)
