# SPDX-License-Identifier: Apache-2.0
"""Schedule any scalar of the run: a coefficient, a clip bound, a temperature, a reward weight, a completion length."""

from __future__ import annotations

import math
from typing import Any, Literal

from lit_rl.hooks import RolloutCallback


class ScalarSchedule(RolloutCallback):
    """Moves one number of the method from ``start`` to ``end`` over a range of rollout steps.

    The value is a function of ``rollout_step`` alone, so it resumes and rewinds by itself. It is logged at every step
    as ``schedule/<target>``. Use several instances side by side for several numbers.

    Args:
        target: path of the attribute from the method: ``kl_coef``, ``surrogate.clip_high``, ``sampling.temperature``,
            ``sampling.max_tokens``, ``rewards.<name>.weight`` or ``callbacks.<class name>.<attribute>``.
        start: value up to ``begin``.
        end: value from ``begin + steps`` on.
        steps: length of the change in rollout steps.
        begin: first step of the change.
        shape: ``linear``, ``cosine``, ``exponential`` (geometric; both ends must have the same sign) or ``step`` (jumps
            at the end of the range).
    """

    def __init__(
        self,
        target: str,
        start: float,
        end: float,
        steps: int,
        begin: int = 0,
        shape: Literal["linear", "cosine", "exponential", "step"] = "linear",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        if shape == "exponential" and start * end <= 0:
            raise ValueError("An exponential schedule needs start and end of the same sign, neither of them 0.")
        self.target, self.start, self.end, self.steps, self.begin, self.shape = target, start, end, steps, begin, shape

    @property
    def state_key(self) -> str:
        return f"ScalarSchedule[{self.target}]"

    def value(self, step: int) -> float:
        """The scheduled value at a rollout step."""
        x = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        if self.shape == "step":
            return self.end if x == 1 else self.start
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** x
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + x * (self.end - self.start)

    def check_setup(self, module: Any) -> None:
        """The attribute must exist and be a number."""
        holder, name = resolve(module, self.target)
        now = getattr(holder, name)
        if isinstance(now, bool) or not isinstance(now, (int, float)):
            raise ValueError(f"ScalarSchedule target {self.target!r} is {now!r}, which is not a number.")
        self._integer = isinstance(now, int) and not any(isinstance(v, float) and v % 1 for v in (self.start, self.end))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the value before the step begins."""
        holder, name = resolve(pl_module, self.target)
        value = self.value(pl_module.rollout_step)
        setattr(holder, name, round(value) if self._integer else value)
        pl_module.log(f"schedule/{self.target}", float(value))


def resolve(module: Any, path: str) -> tuple[Any, str]:
    """The object that holds the attribute at the end of a dotted path, and the attribute's name.

    Raises:
        ValueError: naming the first part that does not exist and what there is instead.
    """
    *parts, name = path.split(".")
    holder = module
    while parts:
        part = parts.pop(0)
        if holder is module and part == "rewards":
            holder = _pick({r.name: r for r in module.rewards}, parts.pop(0), path)
        elif holder is module and part == "callbacks":
            holder = _pick({type(c).__name__: c for c in module.trainer.callbacks}, parts.pop(0), path)
        else:
            if not hasattr(holder, part):
                raise ValueError(f"ScalarSchedule target {path!r}: {type(holder).__name__} has no attribute {part!r}.")
            holder = getattr(holder, part)
    if not hasattr(holder, name):
        numbers = sorted(k for k, v in vars(holder).items() if isinstance(v, (int, float)) and not k.startswith("_"))
        raise ValueError(
            f"ScalarSchedule target {path!r}: {type(holder).__name__} has no attribute {name!r}. "
            f"Numbers there: {numbers}."
        )
    return holder, name


def _pick(named: dict[str, Any], name: str, path: str) -> Any:
    if name not in named:
        raise ValueError(f"ScalarSchedule target {path!r}: there is no {name!r}, only {sorted(named)}.")
    return named[name]
