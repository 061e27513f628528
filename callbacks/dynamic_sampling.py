# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling: drop groups that teach nothing and draw others in their place."""

from __future__ import annotations

from typing import Any

from lit_rl import distributed as ranks
from lit_rl.callbacks.signal import GroupFilter, carries_signal
from lit_rl.rollouts import Rollouts


class DynamicSampling(GroupFilter):
    """DAPO's dynamic sampling (arXiv 2503.14476): groups with equal rewards are dropped and the batch is refilled.

    Each rank asks for as many prompts as it lacks. The method's ``max_rounds`` bounds the attempts; after the last one
    the step goes on with what it has. Demonstrations and replayed text are kept.

    Logged: ``dynamic_sampling/kept_ratio`` (groups kept of those sampled), ``dynamic_sampling/rounds``.

    Args:
        enabled: False leaves the run untouched.
    """

    filters_in = "on_rewards"

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Drop the groups without reward variance."""
        if not self.enabled:
            return None
        useful = carries_signal(rollouts)
        module.ledger.mean("dynamic_sampling/kept_ratio", useful.float())
        module.ledger.total("dynamic_sampling/rounds", 1.0 / ranks.world_size())
        return rollouts if bool(useful.all()) else rollouts.select_groups(useful)

    def on_collected(self, trainer: Any, module: Any, rollouts: Rollouts) -> int | None:
        """Ask for as many prompts as are missing."""
        if not self.enabled:
            return None
        return max(0, module.prompts_per_step // ranks.world_size() - len(rollouts.prompts))
