# SPDX-License-Identifier: Apache-2.0
"""RECAP: weight the objectives of a run by how fast each improves and how unstable it is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts


@dataclass
class Objective:
    """One of the things that a run should become or stay good at.

    Args:
        name: for logging.
        monitor: name of the logged value to watch, such as ``loss/sft`` or ``reward/math``.
        kind: ``"loss"`` for a positive value that should fall, ``"reward"`` for one that should rise (how rewards enter
            is reconstructed: the paper gives formulas for losses).
        target: what the weight multiplies: ``"loss:<term>"`` or ``"reward:<term>"``; default: the monitored name's.
    """

    name: str
    monitor: str
    kind: Literal["loss", "reward"] = "loss"
    target: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("loss", "reward"):
            raise ValueError(f"kind of objective {self.name!r} must be 'loss' or 'reward', got {self.kind!r}.")
        if self.target is None:
            self.target = self.monitor.replace("/", ":", 1)
        if self.target.split(":")[0] not in ("loss", "reward"):
            raise ValueError(f"target of objective {self.name!r} must be 'loss:<term>' or 'reward:<term>'.")


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


class RECAP(RolloutCallback):
    """RECAP (arXiv 2510.21978): objectives that saturate lose weight, volatile or lagging ones gain it.

    Values are read from the log at the end of each step and weigh the steps after it (the paper's helper also uses the
    step's own value, which for losses is known only after the update). Until 2W values are there, every weight is 1.

    Args:
        objectives: what is weighted against each other.
        window: W, half the history.
        temperature: T of the softmax over objectives; infinity is uniform.
        center: see `improvement_and_instability`.
        cap: bound of the improvement signal (reconstructed: near saturation a reward's ratio can explode).
        enabled: False leaves the run untouched.
    """

    def __init__(
        self,
        objectives: list[Objective],
        window: int = 10,
        temperature: float = 5.0,
        center: Literal["all", "current"] = "all",
        cap: float | None = 5.0,
        enabled: bool = True,
    ) -> None:
        if not objectives:
            raise ValueError("RECAP needs at least one objective to weigh.")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.objectives = list(objectives)
        self.window, self.temperature, self.center, self.cap = window, temperature, center, cap
        self.enabled = enabled
        self.history: dict[str, deque[float]] = {o.name: deque(maxlen=2 * window) for o in self.objectives}
        self.weights = {o.name: 1.0 for o in self.objectives}

    def check_setup(self, module: Any) -> None:
        """Every target must exist: a typo would silently weigh nothing."""
        known = {f"loss:{t.name}" for t in module.loss_terms} | {f"reward:{r.name}" for r in module.rewards}
        for objective in self.objectives:
            if objective.target not in known:
                raise ValueError(
                    f"RECAP objective {objective.name!r} targets {objective.target!r}; there is {sorted(known)}."
                )

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Multiply the weights of reward terms."""
        if not self.enabled:
            return
        for objective in self.objectives:
            kind, _, name = str(objective.target).partition(":")
            if kind == "reward" and name in rollouts.reward_weights:
                rollouts.reward_weights[name] = rollouts.reward_weights[name] * self.weights[objective.name]
        for objective in self.objectives:
            module.ledger.mean(f"recap/lambda/{objective.name}", torch.tensor([self.weights[objective.name]]))

    def on_loss_terms(self, trainer: Any, module: Any, terms: list[Any]) -> None:
        """Multiply the coefficients of loss terms."""
        if not self.enabled:
            return
        by_target = {o.target: self.weights[o.name] for o in self.objectives}
        for term in terms:
            term.coefficient = term.coefficient * by_target.get(f"loss:{term.name}", 1.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the step's values from the log and compute the next weights."""
        if not self.enabled:
            return
        values = {o.name: trainer.callback_metrics.get(o.monitor) for o in self.objectives}
        for name, value in values.items():
            if value is not None and math.isfinite(float(value)):
                self.history[name].append(float(value))
        if any(len(h) < 2 * self.window for h in self.history.values()):
            return
        signals = {
            o.name: improvement_and_instability(list(self.history[o.name]), o.kind, self.center, cap=self.cap)
            for o in self.objectives
        }
        weights = objective_weights([c + i for c, i in signals.values()], self.temperature)
        self.weights = dict(zip(signals, weights))
        pl_module.log_dict(
            {f"recap/c/{n}": c for n, (c, _) in signals.items()} | {f"recap/i/{n}": i for n, (_, i) in signals.items()}
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": {k: list(v) for k, v in self.history.items()}, "weights": dict(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, values in state_dict["history"].items():
            self.history[name] = deque(values, maxlen=2 * self.window)
        self.weights = dict(state_dict["weights"])
