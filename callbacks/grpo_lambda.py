# SPDX-License-Identifier: Apache-2.0
"""GRPO-λ: a length penalty only where the policy is already able."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts

TERM = "length_penalty"


class GRPOLambda(RolloutCallback):
    r"""GRPO-λ (arXiv 2505.18086): the best-solved fraction λ of the groups is rewarded for being short.

    Groups of the global batch (all ranks) are ranked by accuracy; the first :math:`\lceil \lambda B \rceil` form E. A
    correct completion in E is rewarded :math:`1 - \alpha\,\sigma((L - \mu) / s)`, where μ and s are mean and deviation
    of the lengths of the *correct* completions of its group; everything else keeps its reward. The penalty is a reward
    term of its own (``length_penalty``), so the verdicts stay as they are.

    Not known from the paper, so arguments here: the tie rule (a stable order is used), the deviation's divisor
    (population by default), α in its runs (0.6 is a third party's), and the absolute variant ``threshold`` (ours).

    Args:
        fraction: λ, the share of groups that is penalised; 0 is plain GRPO, 1 a static length penalty.
        alpha: α, strength of the penalty, in [0, 1).
        threshold: if set, groups of at least this accuracy form E instead of the top fraction.
        ddof: divisor n − ddof of the deviation.
        eps: floor of the deviation.
    """

    requires = frozenset({"correct"})

    def __init__(
        self,
        fraction: float = 0.2,
        alpha: float = 0.6,
        threshold: float | None = None,
        ddof: int = 0,
        eps: float = 1e-4,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}: it is a share of the groups.")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {alpha}: at 1 a long correct answer is worth a wrong one.")
        self.fraction, self.alpha, self.threshold, self.ddof, self.eps = fraction, alpha, threshold, ddof, eps

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Choose E over all ranks and add the penalty as a reward term."""
        if self.alpha == 0 or (self.fraction == 0 and self.threshold is None):
            return
        accuracy = torch.nan_to_num(rollouts.group_mean(rollouts.correct), nan=-1.0)
        everywhere, mine = ranks.all_gather_concat(accuracy)
        chosen = self.choose(everywhere)
        selected = chosen[mine][rollouts.group]
        penalty = self.penalty(rollouts, selected)
        rollouts.reward_terms[TERM] = penalty
        rollouts.reward_weights[TERM] = torch.ones_like(penalty)
        ledger, lengths = module.ledger, rollouts.lengths.float()
        ledger.mean("grpo_lambda/selected_fraction", chosen[mine].float())
        lowest = everywhere[chosen].min() if chosen.any() else torch.tensor(math.nan)
        ledger.mean("grpo_lambda/acc_threshold", lowest.reshape(1).float())
        ledger.mean("grpo_lambda/len_selected", lengths, selected)
        ledger.mean("grpo_lambda/len_rest", lengths, ~selected)
        ledger.mean("grpo_lambda/penalty_mean", -penalty, selected & (rollouts.correct == 1))

    def choose(self, accuracy: Tensor) -> Tensor:
        """``[B]`` bool: the groups of E, from the accuracies of the global batch."""
        if self.threshold is not None:
            return accuracy >= self.threshold
        count = math.ceil(round(self.fraction * len(accuracy), 9))
        first = torch.argsort(accuracy, descending=True, stable=True)[:count]
        chosen = torch.zeros(len(accuracy), dtype=torch.bool, device=accuracy.device)
        chosen[first] = True
        return chosen

    def penalty(self, rollouts: Rollouts, selected: Tensor) -> Tensor:
        """``[N]``: −α σ((L − μ)/s) on correct completions of E, 0 elsewhere."""
        right = rollouts.correct == 1
        lengths = rollouts.lengths.double()
        nan = torch.where(right, lengths, math.nan)
        mean = rollouts.group_mean(nan)[rollouts.group]
        square = torch.where(right, (lengths - mean).square(), 0.0)
        zeros = torch.zeros(len(rollouts.prompts), dtype=torch.float64, device=rollouts.device)
        total = zeros.index_add(0, rollouts.group, square)
        count = zeros.index_add(0, rollouts.group, right.double())
        std = (total / (count - self.ddof).clamp(min=1)).sqrt()[rollouts.group].clamp(min=self.eps)
        shaped = -self.alpha * torch.sigmoid((lengths - mean) / std)
        return torch.where(selected & right, shaped, 0.0).float()
