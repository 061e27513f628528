# SPDX-License-Identifier: Apache-2.0
"""GRPO-λ: a length penalty only where the policy is already able."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.callbacks.signal import filters_before, verdicts
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts

TERM = "length_penalty"


class GRPOLambda(RolloutCallback):
    r"""GRPO-λ (arXiv 2505.18086): the best-solved fraction λ of the groups is rewarded for being short.

    Groups of the global batch (all ranks) are ranked by accuracy; the first :math:`\lceil \lambda B \rceil` form E. A
    correct completion in E is rewarded :math:`1 - \alpha\,\sigma((L - \mu) / s)`, where μ and s are mean and deviation
    of the lengths of the *correct* completions of its group; everything else keeps its reward. So among completions of
    a group that is solved anyway the shortest wins, and groups that are still being learned are left in peace.

    The penalty is a reward term of its own (``length_penalty``) with the weights of the verifier's term: verdicts stay
    as they are, and a correct completion remains worth more than a wrong one however the rewards are weighted. It is
    added when the batch is ready, after completions were cut, replaced or scored again.

    Logged: ``grpo_lambda/selected_fraction``, ``grpo_lambda/acc_threshold`` (accuracy of the last group in E),
    ``grpo_lambda/len_selected`` and ``grpo_lambda/len_rest`` (mean lengths in tokens), ``grpo_lambda/penalty_mean``
    (mean of :math:`\alpha\sigma` over the correct completions in E).

    Not known from the paper: the tie rule (drawing order here), the deviation's divisor (population, as in a third
    party's code), α in its runs (0.6 is that third party's). The absolute variant ``threshold`` is ours.

    Args:
        fraction: λ, the share of groups that is penalised; 0 is plain GRPO, 1 a static length penalty. Schedule it with
            ``ScalarSchedule("callbacks.GRPOLambda.fraction", …)``.
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
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {ddof}.")
        self.fraction, self.alpha = float(fraction), float(alpha)
        self.threshold, self.ddof, self.eps = threshold, ddof, eps

    def check_setup(self, module: Any) -> None:
        """Find the verifier's term; warn if solved groups, which the penalty is for, are dropped before."""
        verifier = next(r for r in module.rewards if r.verifier)
        if verifier.weight == 0:
            raise ValueError(
                f"GRPOLambda takes its penalty from the reward of the verifier {verifier.name!r}, whose weight is 0: "
                "give it a weight."
            )
        if any(r.name == TERM for r in module.rewards):
            raise ValueError(f"GRPOLambda adds a reward term {TERM!r}: give your reward of that name another one.")
        self.verifier = verifier.name
        filters = filters_before(self, "on_batch_ready", module)
        if filters:
            rank_zero_warn(
                f"GRPOLambda penalises length where the policy is able, but {' and '.join(filters)} drops the groups "
                "that are solved in full before it ranks them. List GRPOLambda before PredictiveDynamicSampling; with "
                "DynamicSampling only groups that are solved in part are left to be penalised."
            )

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Choose E over all ranks and add the penalty as a reward term."""
        if self.alpha == 0 or (self.fraction == 0 and self.threshold is None):
            return
        accuracy = rollouts.group_mean(verdicts(rollouts))  # [B], NaN where there is no verdict
        everywhere, mine = ranks.all_gather_concat(accuracy)
        chosen = self.choose(everywhere)
        selected = chosen[mine][rollouts.group]  # [N]
        penalty = self.penalty(rollouts, selected)
        rollouts.reward_terms[TERM] = penalty
        rollouts.reward_weights[TERM] = rollouts.reward_weights[self.verifier].clone()
        ranked, lengths = ~torch.isnan(accuracy), rollouts.lengths.float()
        ledger = module.ledger
        ledger.mean("grpo_lambda/selected_fraction", chosen[mine].float(), ranked)
        if chosen.any():
            ledger.mean("grpo_lambda/acc_threshold", everywhere[chosen].amin(0, keepdim=True))
        ledger.mean("grpo_lambda/len_selected", lengths, selected)
        ledger.mean("grpo_lambda/len_rest", lengths, ~selected & ranked[rollouts.group])
        ledger.mean("grpo_lambda/penalty_mean", -penalty, selected & (verdicts(rollouts) == 1))

    def choose(self, accuracy: Tensor) -> Tensor:
        """``[B]`` bool: the groups of E, from the accuracies of the global batch; NaN groups are not ranked."""
        if self.threshold is not None:
            return accuracy >= self.threshold
        ranked = int((~torch.isnan(accuracy)).sum())
        # Rounding first keeps 0.2 x 10 from becoming 3 through binary fractions.
        count = math.ceil(round(self.fraction * ranked, 9))
        order = torch.argsort(torch.nan_to_num(accuracy, nan=-1.0), descending=True, stable=True)
        chosen = torch.zeros(len(accuracy), dtype=torch.bool, device=accuracy.device)
        chosen[order[:count]] = True
        return chosen

    def penalty(self, rollouts: Rollouts, selected: Tensor) -> Tensor:
        """``[N]``: −α σ((L − μ)/s) on the correct completions of the ``selected`` rows, 0 elsewhere."""
        right = verdicts(rollouts) == 1
        lengths = rollouts.lengths.double()
        mean = rollouts.group_mean(torch.where(right, lengths, math.nan))[rollouts.group]
        zeros = torch.zeros(len(rollouts.prompts), dtype=torch.float64, device=rollouts.device)
        squares = zeros.index_add(0, rollouts.group, torch.where(right, (lengths - mean).square(), 0.0))
        count = zeros.index_add(0, rollouts.group, right.double())
        std = (squares / (count - self.ddof).clamp(min=1)).sqrt()[rollouts.group].clamp(min=self.eps)
        penalty = -self.alpha * torch.sigmoid((lengths - mean) / std)
        return torch.where(selected & right, penalty, 0.0).float()
