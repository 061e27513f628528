# SPDX-License-Identifier: Apache-2.0
"""The decisions of AutoNPO: has learning stalled, and how far back is best."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any


def choose_distance(quality: Mapping[int, float], variance: Mapping[int, float]) -> int:
    r"""The distance Δ that maximises :math:`\hat S = \hat Q / \hat V`; the smallest of equals.

    >>> choose_distance({20: 0.3, 30: 0.6}, {20: 1.0, 30: 1.5})
    30
    """
    return min(quality, key=lambda d: (-quality[d] / variance[d], d))


class Stagnation:
    """The smoothed reward has stopped rising while the smoothed entropy keeps falling.

    The constants are reconstructed: the sources name the two signals but give no numbers.

    Args:
        decay: of both moving averages.
        window: w, steps that both are compared over.
        reward_gain: the reward stagnates if it gained less than this over the window.
        entropy_drop: the entropy falls if it lost more than this share over the window.
    """

    def __init__(
        self, decay: float = 0.9, window: int = 20, reward_gain: float = 0.002, entropy_drop: float = 0.05
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        self.decay, self.window = decay, window
        self.reward_gain, self.entropy_drop = reward_gain, entropy_drop
        self.reset()

    def reset(self) -> None:
        """Forget everything: the comparison starts anew."""
        self.rewards: deque[float] = deque(maxlen=self.window + 1)
        self.entropies: deque[float] = deque(maxlen=self.window + 1)

    def update(self, reward: float, entropy: float) -> bool:
        """Take one step's values; True if learning has stalled."""
        for averages, value in ((self.rewards, reward), (self.entropies, entropy)):
            averages.append(self.decay * averages[-1] + (1 - self.decay) * value if averages else value)
        if len(self.rewards) <= self.window:
            return False
        stagnates = self.rewards[-1] - self.rewards[0] < self.reward_gain
        return stagnates and self.entropies[-1] < (1 - self.entropy_drop) * self.entropies[0]

    def state_dict(self) -> dict[str, Sequence[float]]:
        return {"rewards": list(self.rewards), "entropies": list(self.entropies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.rewards.extend(state["rewards"])
        self.entropies.extend(state["entropies"])
