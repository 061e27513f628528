# SPDX-License-Identifier: Apache-2.0
"""How much each term of a loss pulls: the norms of their gradients, one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import LossTerm


class TermGradients(RolloutCallback):
    """Logs the gradient norm of every loss term by itself, coefficient included, at every few steps.

    ``loss/<term>`` says nothing about how much a term moves the weights; the ratio of gradient norms does. For KDRL,
    ``gradient/kd_ratio`` compares distillation with the policy gradient. Terms pull in different directions, so the
    norms do not add up to ``policy/grad_norm``.

    A measured step costs one more backward pass for each term, and memory for one gradient of each in float32. Training
    is not touched. List it after callbacks that change coefficients. With several optimizer steps on a batch the logged
    norm is the mean over them.

    Logged: ``gradient/<term>``, and for every other term ``gradient/<term>_ratio``, its norm divided by that of
    ``relative_to`` (left out where that is 0).

    Args:
        every: measure at rollout steps that are multiples of this.
        relative_to: name of the term that the others are compared with.

    Raises:
        ValueError: ``every`` is not positive.
    """

    def __init__(self, every: int = 10, relative_to: str = "policy") -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.every, self.relative_to = every, relative_to
        self._sums: dict[str, Tensor] = {}  # gradient of each term in the optimizer step under way, flat
        self._norms: dict[str, list[float]] = {}

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Any) -> None:
        """A new batch."""
        self._sums, self._norms = {}, {}

    def on_loss_terms(self, trainer: Any, module: Any, terms: list[LossTerm]) -> None:
        """Differentiate each term of a micro-batch by itself."""
        if module.rollout_step % self.every:
            return
        weights = [p for p in module.model.parameters() if p.requires_grad]
        if any(hasattr(p, "full_tensor") for p in weights):
            raise ValueError("TermGradients needs whole weights on every rank and these are sharded: use ddp.")
        for term in terms:
            loss = term.loss()
            if loss.requires_grad and float(term.coefficient) != 0:
                found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found)]
                self._add(term.name, torch.cat([g.flatten().float() for g in flat]))

    def _add(self, name: str, gradient: Tensor) -> None:
        self._sums[name] = gradient if name not in self._sums else self._sums[name].add_(gradient)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """All micro-batches are through: the norms of the sums over them and over all ranks."""
        if pl_module.rollout_step % self.every:
            return
        for name in ranks.union_of_names(self._sums):
            gradient = self._sums.get(name)
            if gradient is None:  # this rank had nothing to train on
                count = sum(p.numel() for p in pl_module.model.parameters() if p.requires_grad)
                gradient = torch.zeros(count, device=pl_module.device)
            self._norms.setdefault(name, []).append(float(ranks.all_sum(gradient).norm()))
        self._sums = {}

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Log the norms of the step."""
        means = {name: sum(norms) / len(norms) for name, norms in self._norms.items()}
        base = means.get(self.relative_to, 0.0)
        numbers = {f"gradient/{name}": norm for name, norm in means.items()}
        if base:
            others = (name for name in means if name != self.relative_to)
            numbers |= {f"gradient/{name}_ratio": means[name] / base for name in others}
        if numbers:
            module.log_numbers(numbers)
