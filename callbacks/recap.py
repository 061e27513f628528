# SPDX-License-Identifier: Apache-2.0
"""RECAP: weight the objectives of a run by how fast each improves and how unstable it is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch

from lit_rl.callbacks.monitor import Monitor
from lit_rl.callbacks.recap_objective import Objective, improvement_and_instability, objective_weights
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts


class RECAP(RolloutCallback):
    r"""RECAP (arXiv 2510.21978): objectives that saturate lose weight, volatile or lagging ones gain it.

    Objective k is watched through the mean of its last W values over that of the W before (:math:`c_k`) and through its
    deviation over both means (:math:`i_k`); it is weighted by
    :math:`\lambda_k = K\,\mathrm{softmax}_k((c + i) / T)`, so the weights have mean 1. Until 2W values are there every
    weight is 1.

    A step's values weigh the steps after it. The paper's helper also lets them into the step's own weight, which a loss
    that is accumulated over micro-batches does not know in time. Its factor 1/K is left to the learning rate.

    A reward that is alone in its group cannot be weighted through ``reward:<term>`` when advantages are divided by the
    group's deviation, which takes the factor out again: setup asks for ``source:`` or ``loss:`` then.

    Logged: ``recap/lambda/<name>`` at every step; ``recap/c/<name>`` and ``recap/i/<name>`` once they are known.

    Args:
        objectives: what is weighted against each other.
        window: W, half the history; 10 in the paper.
        temperature: T of the softmax over objectives; 5 in the paper, infinity is uniform.
        center: see `improvement_and_instability`.
        cap: bound of c (reconstructed: a reward that rises from 0 makes it explode).
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
        for what in ("name", "target"):
            names = [o.name if what == "name" else f"{o.scope}:{o.of}" for o in objectives]
            if len(set(names)) < len(names):
                raise ValueError(f"RECAP's objectives must differ in their {what}, got {names}.")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if center not in ("all", "current"):
            raise ValueError(f"center must be 'all' or 'current', got {center!r}.")
        self.objectives, self.window, self.temperature = list(objectives), window, temperature
        self.center, self.cap, self.enabled = center, cap, enabled
        self.monitors = {
            o.name: [Monitor(m, f"RECAP's {o.name!r}", 2 * window) for m in o.monitors] for o in objectives
        }
        self.history: dict[str, deque[float]] = {o.name: deque(maxlen=2 * window) for o in objectives}
        self.weights = {o.name: 1.0 for o in objectives}

    def check_setup(self, module: Any) -> None:
        """Every target and monitor must exist, and its weight must have an effect."""
        terms, rewards = [t.name for t in module.loss_terms], [r.name for r in module.rewards]
        known = {"loss": terms, "reward": rewards}
        for objective in self.objectives:
            if objective.scope in known and objective.of not in known[objective.scope]:
                raise ValueError(
                    f"RECAP's objective {objective.name!r} targets the {objective.scope} term {objective.of!r}; there "
                    f"is {known[objective.scope]}."
                )
            for monitor in objective.monitors:
                kind, _, name = monitor.partition("/")
                if kind in known and name not in (*known[kind], "mean", "std"):
                    raise ValueError(
                        f"RECAP's objective {objective.name!r} monitors {monitor!r}; there is "
                        f"{[f'{kind}/{n}' for n in known[kind]]}."
                    )
            if objective.scope == "reward" and self._alone(module, objective.of):
                raise ValueError(
                    f"RECAP's objective {objective.name!r} weighs the reward {objective.of!r}, which is alone in its "
                    "groups: dividing by the group's deviation takes the weight out again. Set its target to "
                    "'source:<source>' or 'loss:policy', or advantage.scale to 'none' or 'batch'."
                )

    def _alone(self, module: Any, name: str) -> bool:
        """Whether scaling a reward leaves the advantages as they are."""
        if getattr(getattr(module, "advantage", None), "scale", None) != "group":
            return False
        mine = next(r for r in module.rewards if r.name == name)
        others = [r for r in module.rewards if r is not mine and r.weight != 0]
        return not any(r.sources is None or mine.sources is None or set(r.sources) & set(mine.sources) for r in others)

    def weight(self, scope: str, of: str) -> float:
        """The present weight of a target; 1 if it is none."""
        return next((self.weights[o.name] for o in self.objectives if (o.scope, o.of) == (scope, of)), 1.0)

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Multiply the weights of reward terms."""
        for name, weights in rollouts.reward_weights.items():
            if self.weight("reward", name) != 1:
                rollouts.reward_weights[name] = weights * self.weight("reward", name)

    def on_advantages(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Multiply the advantages of data sources."""
        weights = [self.weight("source", source) for source in rollouts.prompts.source]
        if any(w != 1 for w in weights):
            factor = torch.tensor(weights, device=rollouts.device)[rollouts.group]
            rollouts.advantages = rollouts.advantages * factor[:, None]

    def on_loss_terms(self, trainer: Any, module: Any, terms: list[Any]) -> None:
        """Multiply the coefficients of loss terms."""
        for term in terms:
            term.coefficient = term.coefficient * self.weight("loss", term.name)

    def on_metrics(self, trainer: Any, module: Any, metrics: Mapping[str, float]) -> None:
        """Take the step's values and compute the weights of the next one."""
        if not self.enabled:
            return
        for name, monitors in self.monitors.items():
            values = [v for v in (monitor.read(metrics) for monitor in monitors) if math.isfinite(v)]
            if values:
                self.history[name].append(sum(values) / len(values))
        if all(len(history) == 2 * self.window for history in self.history.values()):
            signals = {
                o.name: improvement_and_instability(list(self.history[o.name]), o.kind, self.center, cap=self.cap)
                for o in self.objectives
            }
            weights = objective_weights([c + i for c, i in signals.values()], self.temperature)
            self.weights = dict(zip(signals, weights))
            module.log_dict({f"recap/c/{name}": c for name, (c, _) in signals.items()})
            module.log_dict({f"recap/i/{name}": i for name, (_, i) in signals.items()})
        module.log_dict({f"recap/lambda/{name}": weight for name, weight in self.weights.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"history": {k: list(v) for k, v in self.history.items()}, "weights": dict(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.history:
            values = state_dict["history"].get(name, [])
            self.history[name] = deque(values, maxlen=2 * self.window)
            self.weights[name] = state_dict["weights"].get(name, 1.0)
