# SPDX-License-Identifier: Apache-2.0
"""The mathematics of RECAP: what an objective is, how its progress is measured and becomes a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class Objective:
    """One of the things that a run should become or stay good at.

    Args:
        name: for logging.
        monitor: the logged value to watch, such as ``loss/sft`` or ``reward/math``. Where several sources have a reward
            of their own for the same objective, a list of names, whose mean is taken.
        kind: ``"loss"`` for a positive value that should fall, ``"reward"`` for one that should rise (reconstructed:
            the paper gives formulas for losses).
        target: what the weight multiplies: ``loss:<term>`` the coefficient of a loss term, ``reward:<term>`` a reward
            term before advantages are taken, ``source:<source>`` the advantages (so the policy loss) of the
            completions of one data source. Default: the loss or reward term that is monitored.
    """

    name: str
    monitor: str | list[str]
    kind: Literal["loss", "reward"] = "loss"
    target: str | None = None

    def __post_init__(self) -> None:
        self.monitors = [self.monitor] if isinstance(self.monitor, str) else list(self.monitor)
        if not self.monitors:
            raise ValueError(f"Objective {self.name!r} has nothing to monitor.")
        if self.kind not in ("loss", "reward"):
            raise ValueError(f"kind of objective {self.name!r} must be 'loss' or 'reward', got {self.kind!r}.")
        self.scope, _, self.of = (self.target or self.monitors[0].replace("/", ":", 1)).partition(":")
        if (
            self.scope not in ("loss", "reward", "source")
            or not self.of
            or (len(self.monitors) > 1 and not self.target)
        ):
            raise ValueError(
                f"Objective {self.name!r} needs a target: 'loss:<term>', 'reward:<term>' or 'source:<source>'."
            )
        if self.kind == "loss" and "loss/policy" in self.monitors:
            raise ValueError(
                f"Objective {self.name!r} watches loss/policy, a surrogate whose value says nothing about progress: "
                "watch the reward (kind 'reward', monitor 'reward/mean') and set target to 'loss:policy'."
            )


def improvement_and_instability(
    history: Sequence[float],
    kind: Literal["loss", "reward"] = "loss",
    center: Literal["all", "current"] = "all",
    eps: float = 1e-6,
    cap: float | None = None,
) -> tuple[float, float]:
    """c and i of one objective from its last 2W values (arXiv 2510.21978, section 3).

    Args:
        history: 2W values, oldest first.
        kind: whether the value should fall or rise.
        center: mean that the deviation is taken around: of all 2W values (the paper's code) or of the current window
            (its formula).
        eps: floor of the denominators.
        cap: upper bound of c; None: no bound.

    Returns:
        c, the previous over the current mean (the inverse for rewards), and i, deviation over the sum of both means.
    """
    half = len(history) // 2
    previous, current = sum(history[:half]) / half, sum(history[half:]) / half
    around = current if center == "current" else sum(history) / len(history)
    sigma = math.sqrt(sum((x - around) ** 2 for x in history) / (len(history) - 1))
    above, below = (previous, current) if kind == "loss" else (current, previous)
    c = max(above, eps) / max(below, eps)
    return c if cap is None else min(c, cap), sigma / max(previous + current, eps)


def objective_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """K softmax(s / T): positive, with mean 1.

    >>> [round(w, 5) for w in objective_weights([2.19245, 1.0], 5.0)]
    [1.11868, 0.88132]
    """
    top = max(scores)
    powers = [math.exp((s - top) / temperature) for s in scores]
    return [len(scores) * p / sum(powers) for p in powers]
