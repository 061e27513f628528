# SPDX-License-Identifier: Apache-2.0
"""Which groups of a batch can teach anything: shared by the callbacks that filter."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts


def has_reward_variance(rollouts: Rollouts) -> Tensor:
    """``[B]`` bool: groups whose scorable rewards are not all equal."""
    rewards = rollouts.rewards
    low = torch.full((len(rollouts.prompts),), torch.inf, device=rollouts.device)
    high = -low
    valid = ~torch.isnan(rewards)
    low = low.scatter_reduce(0, rollouts.group, torch.where(valid, rewards, torch.inf), "amin")
    high = high.scatter_reduce(0, rollouts.group, torch.where(valid, rewards, -torch.inf), "amax")
    return high > low
