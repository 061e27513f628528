# SPDX-License-Identifier: Apache-2.0
"""The GRPO family: one method with explicit switches. Every named algorithm is a preset in ``configs/methods``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.methods.module import RLModule
from lit_rl.methods.terms import EntropyTerm, KLTerm, LikelihoodTerm, PolicyTerm, Term
from lit_rl.objectives import AdvantageNormalizer, Aggregation, Clip, KLPenalty, OffPolicyCorrection, Surrogate
from lit_rl.policies import Policy
from lit_rl.rollouts import Origin, Rollouts


class GRPO(RLModule):
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300) and its relatives.

    The loss is ``policy + kl_coef · KL + entropy_coef · (−entropy) + sft_coef · NLL(demonstrations)``; each term is
    averaged over global counts. With the defaults it is GRPO with token-mean aggregation and without a KL term.

    Args:
        policy: the language model to train.
        advantage: rewards → advantages; default: group mean and standard deviation.
        surrogate: the policy loss (clipping and ratio level); default ``Clip(0.2, 0.2)``.
        aggregation: how token losses are averaged.
        kl: estimator and differentiated surrogate of the KL term; needs ``reference``.
        kl_coef: coefficient of the KL term.
        entropy_coef: coefficient of the entropy bonus.
        sft_coef: coefficient of the likelihood of demonstrations and replayed text, where the sampler delivers any.
        correction: off-policy correction between the sampler and π_old; default: what the sampler asks for.
        mask_truncated: leave completions that hit the token budget out of the loss (DAPO's overlong filtering).
        train_guides: also train completions of origin ``GUIDE`` (a guide checkpoint) and ``TEACHER``.
        kwargs: arguments of `RLModule`.
    """

    def __init__(
        self,
        policy: Policy,
        advantage: AdvantageNormalizer | None = None,
        surrogate: Surrogate | None = None,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        kl: KLPenalty | None = None,
        kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        sft_coef: float = 0.0,
        correction: OffPolicyCorrection | None = None,
        mask_truncated: bool = False,
        train_guides: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.advantage = advantage or AdvantageNormalizer()
        self.surrogate = surrogate or Clip()
        self.aggregation = Aggregation(aggregation)
        self.kl, self.kl_coef = kl or KLPenalty(), kl_coef
        self.entropy_coef, self.sft_coef = entropy_coef, sft_coef
        self.correction = correction if correction is not None else self.sampler.loss_correction
        self.mask_truncated, self.train_guides = mask_truncated, train_guides
        if not self.rewards and "rewards" not in self.sampler.provides:
            raise ValueError(f"{type(self).__name__} learns from rewards: give at least one in `rewards`.")
        if self.advantage.center == "group" and self.group_size == 1:
            raise ValueError(
                "group_size=1 leaves nothing to compare with: a group baseline is then the reward itself and every "
                "advantage is 0. Raise group_size, or set advantage.center to 'batch'."
            )
        if kl_coef and self.reference is None:
            raise ValueError("kl_coef is set but there is no reference policy: set `reference` or kl_coef=0.")

    def terms(self) -> list[Term]:
        shape: dict[str, Any] = {"aggregation": self.aggregation, "max_length": self.sampling.max_tokens}
        rl = [Origin.POLICY, *((Origin.GUIDE, Origin.TEACHER) if self.train_guides else ())]
        terms: list[Term] = [PolicyTerm(self.surrogate, self.correction, origins=rl, **shape)]
        if self.reference is not None:
            terms.append(KLTerm(self.kl, coefficient="kl_coef", origins=rl, **shape))
        return [
            *terms,
            EntropyTerm(coefficient="entropy_coef", origins=rl, **shape),
            LikelihoodTerm(coefficient="sft_coef"),
        ]

    def collect(self) -> Rollouts:
        rollouts = super().collect()
        if self.mask_truncated:
            kept = (rollouts.row["stop_reason"] != 2)[:, None]
            rollouts.loss_weights = torch.where(kept, rollouts.loss_weights, 0.0)
        return rollouts

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """``[N, T]``: one advantage a completion, on every token that counts."""
        rewards = torch.where(rollouts.sampled, rollouts.rewards, torch.nan)  # others: neither baseline nor advantage
        kept = rollouts.kept_mask()
        per_row = self.advantage(rewards, rollouts.group, weights=kept, all_reduce=ranks.all_sum)
        return torch.where(kept, per_row[:, None], 0.0).float()

    def describe(self) -> list[str]:
        return [f"advantage: {self.advantage.describe()}", *super().describe()]
