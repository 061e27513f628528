# SPDX-License-Identifier: Apache-2.0
"""PACED: distil most where the student is neither able nor helpless."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.objectives import Aggregation, aggregation_weights
from lit_rl.rollouts import Rollouts

BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Bins of the logged histogram of pass rates."""


def frontier_weights(pass_rates: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    r"""The Beta kernel :math:`p^\alpha (1-p)^\beta` of pass rates in [0, 1], with 0^0 = 1 and 0 where p is NaN.

    Its maximum is at :math:`\alpha/(\alpha+\beta)`; with α = β = 0 every prompt weighs 1.

    >>> frontier_weights(torch.tensor([0.0, 0.25, 0.5, 1.0])).tolist()
    [0.0, 0.1875, 0.25, 0.0]
    """
    weights = pass_rates.pow(alpha) * (1 - pass_rates).pow(beta)
    return torch.where(torch.isnan(pass_rates), 0.0, weights)


class PACED(RolloutCallback):
    r"""PACED (arXiv 2603.11178): each prompt's loss is weighed by :math:`p^\alpha (1-p)^\beta`, p its pass rate.

    On a prompt that is always solved there is nothing to distil, on one that is never solved the gradient is large and
    incoherent. Nothing else of the distillation changes, and it works with every loss, policy gradients included.
    p is measured on the completions of the batch; with ``memory`` it is a running estimate for each prompt (``uid``),
    which is saved and, on several ranks, shared. A prompt without any verdict has no weight.

    Two stages (forward, then reverse KL) are a `ScalarSchedule` of ``divergence.beta`` beside it.

    Reconstructed: the normalisation. Under ``"mean"`` the weights are divided by their mean over the prompts of the
    optimizer step, so that the learning rate keeps its meaning; ``"none"`` takes them as they are. Prompts of weight 0
    count in the mean of the loss either way, and a step in which every weight is 0 is skipped.

    Args:
        alpha: α.
        beta: β.
        normalize: see above.
        memory: weight of the past in the running estimate, in [0, 1); 0 takes the pass rate of the batch alone.
    """

    requires = frozenset({"correct"})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalize: Literal["mean", "none"] = "mean",
        memory: float = 0.0,
    ) -> None:
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha and beta must not be negative, got {alpha} and {beta}.")
        if normalize not in ("mean", "none"):
            raise ValueError(f"normalize must be 'mean' or 'none', got {normalize!r}.")
        if not 0 <= memory < 1:
            raise ValueError(f"memory is the weight of the past, in [0, 1); got {memory}.")
        self.alpha, self.beta, self.normalize, self.memory = alpha, beta, normalize, memory
        self.rates: dict[int, float] = {}

    def check_setup(self, module: Any) -> None:
        """One completion says 0 or 1, which both weigh nothing."""
        if module.group_size < 2 and not self.memory:
            raise ValueError(
                "PACED measures a pass rate from the completions of a prompt, but group_size is 1: every weight would "
                "be 0. Raise group_size, or set memory to estimate it over time."
            )

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Measure, remember if asked to, and note each row's weight."""
        rates = rollouts.group_mean(rollouts.correct).double()
        if self.memory:
            rates = self.remember(rollouts.prompts.uid.to(rates.device), rates)
        weights = frontier_weights(rates, self.alpha, self.beta)
        rollouts.row["paced_weight"] = weights[rollouts.group]
        ledger = module.ledger
        ledger.mean("paced/pass_rate", rates.float())
        known = ~torch.isnan(rates)
        for low, high in BINS:
            inside = (rates >= low) & (rates < high if high < 1 else rates <= 1)
            ledger.mean(f"paced/rate_{low:g}_to_{high:g}", inside.float(), known)
        ledger.mean("paced/weight", weights.float())
        ledger.mean("paced/zero_ratio", (weights == 0).float())
        ledger.mean("paced/unknown_ratio", torch.isnan(rates).float())
        total, square, count = ranks.all_sum(
            torch.stack([weights.sum(), weights.square().sum(), torch.ones_like(weights).sum()])
        ).tolist()
        ledger.mean("paced/effective_share", torch.tensor([total**2 / (square * count) if square else 0.0]))

    def remember(self, uids: Tensor, rates: Tensor) -> Tensor:
        """The running estimates ``[B]`` after this batch; every rank takes in the prompts of all of them."""
        everywhere, mine = ranks.all_gather_concat(torch.stack([uids.double(), rates], 1))
        exact, _ = ranks.all_gather_concat(uids)  # a double does not hold 63 bits
        for uid, rate in zip(exact.tolist(), everywhere[:, 1].tolist()):
            if not math.isnan(rate):
                past = self.rates.get(uid, rate)
                self.rates[uid] = self.memory * past + (1 - self.memory) * rate
        known = [self.rates.get(uid, math.nan) for uid in exact[mine].tolist()]
        return torch.tensor(known, dtype=rates.dtype, device=rates.device)

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Multiply the loss weights of the mini-batch."""
        weights = rollouts.row["paced_weight"]
        if self.normalize == "mean":
            weights = weights / self.mean_over_prompts(rollouts).clamp(min=1e-8)
        before = rollouts.loss_weights
        after = before * weights[:, None].to(before.dtype)
        # A mean counts what trains; here prompts of weight 0 count, too.
        shape = getattr(module, "aggregation", Aggregation.TOKEN_MEAN), module.sampling.max_tokens
        kept = rollouts.kept_mask()
        counts = [aggregation_weights(torch.where(kept, w, 0.0), *shape)[1].to(before.device) for w in (before, after)]
        whole, training = ranks.all_sum(torch.stack(counts)).tolist()
        rollouts.loss_weights = after * (training / whole if whole else 0.0)

    def mean_over_prompts(self, rollouts: Rollouts) -> Tensor:
        """Mean weight of the prompts of the optimizer step, on all ranks."""
        per_prompt = rollouts.group_mean(rollouts.row["paced_weight"])
        total, count = ranks.all_sum(torch.stack([per_prompt.nansum(), (~torch.isnan(per_prompt)).sum()]))
        return total / count.clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = dict(state_dict["rates"])
