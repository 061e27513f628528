# SPDX-License-Identifier: Apache-2.0
"""Which groups teach anything, and who drops those that do not: shared by the callbacks that select or filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.hooks import HOOKS, RolloutCallback
from lit_rl.rollouts import Rollouts


def verdicts(rollouts: Rollouts) -> Tensor:
    """``[N]``: ``correct`` of the rows that were sampled; NaN for the others, whatever a verifier made of them."""
    return torch.where(rollouts.sampled, rollouts.correct, torch.nan)


def carries_signal(rollouts: Rollouts) -> Tensor:
    """``[B]`` bool: groups to learn from. The scorable rewards of sampled rows differ, or there are rows from data."""
    rewards = torch.where(rollouts.sampled, rollouts.rewards, torch.nan)
    low = torch.full((len(rollouts.prompts),), torch.inf, device=rollouts.device, dtype=rewards.dtype)
    high = -low
    low = low.scatter_reduce(0, rollouts.group, torch.nan_to_num(rewards, nan=torch.inf), "amin")
    high = high.scatter_reduce(0, rollouts.group, torch.nan_to_num(rewards, nan=-torch.inf), "amax")
    from_data = torch.zeros_like(low).index_add(0, rollouts.group, (~rollouts.sampled).to(low.dtype))
    return (high > low) | (from_data > 0)


class GroupFilter(RolloutCallback):
    """A callback that drops the groups without reward variance.

    Attributes:
        enabled: False leaves the run untouched.
        filters_in: the hook in which it drops them.
    """

    enabled: bool
    filters_in: str


def filters_before(callback: RolloutCallback, hook: str, module: Any) -> list[str]:
    """Names of the filters that have already dropped groups when ``callback`` acts in ``hook``."""
    found, listed_before = [], True
    for other in module.trainer.callbacks:
        if other is callback:
            listed_before = False
        elif isinstance(other, GroupFilter) and other.enabled:
            gap = HOOKS.index(hook) - HOOKS.index(other.filters_in)
            if gap > 0 or (gap == 0 and listed_before):
                found.append(type(other).__name__)
    return found


def require_all_groups(callback: RolloutCallback, hook: str, module: Any) -> None:
    """For ``check_setup``: refuse if a filter has dropped groups that ``callback`` works on.

    Raises:
        ValueError: saying which callback to list first.
    """
    filters, name = filters_before(callback, hook, module), type(callback).__name__
    if filters:
        raise ValueError(
            f"{name} works on groups with equal rewards, but {' and '.join(filters)} has dropped those before it acts: "
            f"list {name} before {' and '.join(filters)}."
        )
