# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules over rollout steps that torch does not have under one name."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupLinear(LambdaLR):
    """Linear warm-up to the optimizer's rate, then linear decay to a fraction of it.

    Args:
        optimizer: the optimizer.
        warmup: steps of warm-up (0 starts at the full rate).
        total: steps after which the rate stays at its final value; None: no decay.
        final: final rate as a fraction of the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0, total: int | None = None, final: float = 0.0) -> None:
        if total is not None and total <= warmup:
            raise ValueError(f"total={total} must be larger than warmup={warmup}.")
        self.warmup, self.total, self.final = warmup, total, final
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The multiple of the base rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.total is None:
            return 1.0
        left = max(0.0, (self.total - step) / (self.total - self.warmup))
        return self.final + (1 - self.final) * left
