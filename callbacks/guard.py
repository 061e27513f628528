# SPDX-License-Identifier: Apache-2.0
"""Go back to where a run was still healthy, or stop it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_rl.callbacks.monitor import Monitor
from lit_rl.hooks import RolloutCallback
from lit_rl.rewind import StateRing, check_rewinder, rewind


@dataclass
class Bound:
    """The range in which a logged value is healthy.

    Args:
        monitor: name of the logged value.
        low: smallest healthy value.
        high: largest healthy value.
    """

    monitor: str
    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a value is healthy; NaN is not."""
        return self.low <= value <= self.high


class DivergenceGuard(RolloutCallback):
    """Watches logged values; out of bounds for ``patience`` steps, the run goes back to its last good state or stops.

    A rewound run draws the same prompts again. With nothing else changed it would diverge again, so the learning rate
    is multiplied by ``backoff`` after each rewind. A step that does not measure a value does not break its bound.

    Logged: ``guard/bad_steps`` (unhealthy steps in a row) and ``guard/rewinds``.

    Args:
        bounds: healthy ranges of logged values.
        action: ``"rewind"`` or ``"stop"``.
        patience: unhealthy steps in a row before acting.
        every: rollout steps between saved states.
        max_rewinds: after this many rewinds the run is stopped.
        backoff: factor on the learning rate after a rewind.
        keep: states kept on disk.
    """

    rewinds = False

    def __init__(
        self,
        bounds: list[Bound],
        action: Literal["rewind", "stop"] = "rewind",
        patience: int = 1,
        every: int = 10,
        max_rewinds: int = 3,
        backoff: float = 0.5,
        keep: int = 3,
    ) -> None:
        if not bounds:
            raise ValueError("DivergenceGuard needs at least one bound to watch.")
        if action not in ("rewind", "stop"):
            raise ValueError(f"action must be 'rewind' or 'stop', got {action!r}.")
        if patience < 1 or every < 1 or keep < 1:
            raise ValueError("patience, every and keep must be at least 1.")
        self.bounds, self.action, self.patience = list(bounds), action, patience
        self.every, self.max_rewinds, self.backoff = every, max_rewinds, backoff
        self.monitors = [Monitor(bound.monitor, type(self).__name__) for bound in bounds]
        self.bad_steps = self.rewound = 0
        self.broken: list[str] = []
        self.ring = StateRing(keep)

    def check_setup(self, module: Any) -> None:
        """Refuse samplers that carry completions over into a rewound run."""
        if self.action == "rewind":
            check_rewinder(self, module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state that the run starts from."""
        self.ring.open(pl_module, "guard")
        if self.action == "rewind" and not self.ring.steps():
            self.ring.save(pl_module)

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Compare the step's values with their bounds."""
        self.broken = []
        for bound, monitor in zip(self.bounds, self.monitors):
            value = monitor.read(metrics)
            if bound.monitor in metrics and not bound.holds(value):
                self.broken.append(f"{bound.monitor} = {value:.4g} is outside [{bound.low}, {bound.high}]")
        self.bad_steps = self.bad_steps + 1 if self.broken else 0
        module.log_dict({"guard/bad_steps": float(self.bad_steps), "guard/rewinds": float(self.rewound)})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save a good state, or act on a bad one."""
        if pl_module.interrupted:
            return
        if self.bad_steps >= self.patience:
            self.act(trainer, pl_module, self.broken[0])
        elif not self.broken and self.action == "rewind" and pl_module.rollout_step % self.every == 0:
            self.ring.save(pl_module)

    def act(self, trainer: Any, module: Any, why: str) -> None:
        """Rewind with a smaller learning rate, or stop."""
        self.bad_steps = 0
        if self.action == "stop" or self.rewound >= self.max_rewinds or not self.ring.steps():
            rank_zero_warn(f"DivergenceGuard stops the run at rollout step {module.rollout_step}: {why}.")
            trainer.should_stop = True
            return
        self.rewound += 1
        step = self.ring.steps()[-1]
        rewind(module, self.ring, step)
        scale_learning_rate(module, self.backoff)
        self.ring.save(module)  # the next rewind starts from the smaller rate
        rank_zero_warn(f"DivergenceGuard went back to rollout step {step}: {why}.")

    def on_rewind(self, trainer: Any, module: Any, step: int) -> None:
        """Forget the states of the abandoned future."""
        self.ring.forget_after(step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The checkpoint refers to the ring's files."""
        self.ring.refer(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"bad_steps": self.bad_steps, "rewound": self.rewound, "ring": self.ring.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad_steps, self.rewound = state_dict["bad_steps"], state_dict["rewound"]
        self.ring.load_state_dict(state_dict["ring"])


def scale_learning_rate(module: Any, factor: float) -> None:
    """Multiply the learning rate, and what a scheduler will compute from it."""
    for group in module.optimizers(use_pl_optimizer=False).param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    scheduler = module.lr_schedulers()
    if scheduler is not None:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
