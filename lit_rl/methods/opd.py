# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: the student writes, the teacher scores every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.methods.teaching import DivergenceTerm, Taught, TaughtPolicyTerm
from lit_rl.methods.terms import Term
from lit_rl.objectives import (
    AdvantageNormalizer,
    Aggregation,
    Clip,
    Divergence,
    OffPolicyCorrection,
    Surrogate,
    discounted_returns,
)
from lit_rl.policies import FrozenPolicy, Policy
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutSampler
from lit_rl.samplers.mixed import DatasetMixtureSampler, TeacherMixtureSampler


def teacher_advantages(
    old_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, coef: float = 1.0, discount: float = 0.0
) -> Tensor:
    r"""The per-token reverse KL as an advantage, ``[N, T]``: :math:`-c\,(\log\pi_{old} - \log\pi_T)`, discounted to go.

    At ``discount`` 0 its policy gradient is that of KL(policy || teacher) at the visited states; at 1 that of the KL
    of whole sequences (MiniLLM, arXiv 2306.08543).

    Args:
        old_logprobs: ``[N, T]`` under the policy that sampled.
        teacher_logprobs: ``[N, T]``; NaN where no teacher scored, which gives 0.
        mask: ``[N, T]``, true where a token counts.
        coef: c.
        discount: γ in [0, 1]: a token is also credited with what comes after it.
    """
    gain = coef * (teacher_logprobs - old_logprobs)
    gain = torch.where(mask.bool() & ~torch.isnan(gain), gain, 0.0)
    return gain if discount == 0 else discounted_returns(gain, mask, discount)


class OPD(Taught):
    r"""On-policy distillation (GKD, arXiv 2306.13649, and the per-token reverse KL as an advantage).

    ``loss="gkd"`` differentiates a divergence over the whole vocabulary. ``loss="policy_gradient"`` only asks for the
    teacher's log-probability of each sampled token: :math:`A_t = A^{env}_t - c\,(\log\pi_{old} - \log\pi_T)`, without
    baseline or normalisation. Neither needs a reward; with rewards and ``advantage`` the second is RL and OPD in one.

    Args:
        policy: the student.
        teacher: who scores; several share the work by data source. A frozen policy, or a `Teacher` with its own prompt.
        loss: see above.
        divergence: of ``loss="gkd"``; default the Jensen-Shannon divergence with weight 0.5.
        temperature: divides the logits of both models in the divergence; None: the sampling temperature.
        distill_coef: coefficient of the divergence.
        on_policy_fraction: share of the prompts that the student answers; the others' completions are the dataset's,
            or the teacher's with ``sequence_kd``. (The paper tosses one coin for a batch; here each prompt has its
            own, which has the same expectation.)
        sequence_kd: let the teacher write the completions that are not on-policy.
        column: where the dataset's completions are.
        kl_coef: c, coefficient of the per-token reverse KL in the advantage.
        discount: γ of its discounted sum to go; 0 credits each token with its own alone.
        advantage: how rewards become A^env; None: rewards are only reported.
        surrogate: policy loss of ``loss="policy_gradient"``; default the plain ratio without clipping.
        correction: off-policy correction between the sampler and π_old.
        aggregation: how token losses are averaged.
        group_size: completions of each prompt.
        sampler: generates the student's completions.
        kwargs: arguments of `RLModule`.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: FrozenPolicy | Sequence[FrozenPolicy],
        loss: Literal["gkd", "policy_gradient"] = "gkd",
        divergence: Divergence | None = None,
        temperature: float | None = 1.0,
        distill_coef: float = 1.0,
        on_policy_fraction: float = 1.0,
        sequence_kd: bool = False,
        column: str = "completion",
        kl_coef: float = 1.0,
        discount: float = 0.0,
        advantage: AdvantageNormalizer | None = None,
        surrogate: Surrogate | None = None,
        correction: OffPolicyCorrection | None = None,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        group_size: int = 1,
        sampler: RolloutSampler | None = None,
        **kwargs: Any,
    ) -> None:
        if loss not in ("gkd", "policy_gradient"):
            raise ValueError(f"loss must be 'gkd' or 'policy_gradient', got {loss!r}.")
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {discount}.")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, or None for the sampling temperature, got {temperature}.")
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction is a share of the prompts, in [0, 1]; got {on_policy_fraction}.")
        self.teach_by(teacher)
        if on_policy_fraction < 1:
            if loss == "policy_gradient":
                raise ValueError("loss='policy_gradient' needs the student's own completions: on_policy_fraction=1.")
            sampler = (
                TeacherMixtureSampler(self.teachers[0], on_policy_fraction, sampler)
                if sequence_kd
                else DatasetMixtureSampler(on_policy_fraction, column, generator=sampler)
            )
        super().__init__(policy, sampler=sampler, group_size=group_size, **kwargs)
        if advantage is not None and not self.rewards:
            raise ValueError("advantage turns rewards into advantages, but there are none: give `rewards`.")
        if advantage is not None and advantage.center == "group" and group_size == 1:
            raise ValueError("group_size=1 leaves a group baseline nothing to compare with: raise group_size.")
        self.loss, self.temperature = loss, temperature
        self.divergence, self.distill_coef = divergence or Divergence(), distill_coef
        self.kl_coef, self.discount, self.advantage = kl_coef, discount, advantage
        self.surrogate = surrogate or Clip(math.inf, math.inf)
        self.correction = correction if correction is not None else self.sampler.loss_correction
        self.aggregation = Aggregation(aggregation)

    @property
    def loss_temperature(self) -> float:
        return self.temperature if self.temperature is not None else super().loss_temperature

    def terms(self) -> list[Term]:
        shape: dict[str, Any] = {"aggregation": self.aggregation, "max_length": self.sampling.max_tokens}
        if self.loss == "policy_gradient":
            return [TaughtPolicyTerm(self.surrogate, self.correction, **shape)]
        return [DivergenceTerm(self, self.divergence, coefficient="distill_coef", **shape)]

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """``[N, T]``: the teacher's, plus those of the rewards. Zero with ``loss="gkd"``, which has no use for them."""
        if self.loss == "gkd":
            return super().advantages(rollouts)
        taught = self.teacher_advantages(rollouts)
        if self.advantage is None:
            return taught
        kept = rollouts.kept_mask()
        per_row = self.advantage(rollouts.rewards, rollouts.group, weights=kept, all_reduce=ranks.all_sum)
        return taught + torch.where(kept, per_row[:, None].to(taught), 0.0)

    def teacher_advantages(self, rollouts: Rollouts) -> Tensor:
        """``[N, T]``: what the teacher says of each token, and how far the student is from it."""
        kept = rollouts.kept_mask()
        old, teacher = rollouts.logprobs["old"], rollouts.logprobs["teacher"]
        gap = torch.where(kept, old - teacher, math.nan)
        self.ledger.mean("distill/reverse_kl", gap)
        self.ledger.largest("distill/reverse_kl_max", gap.nan_to_num(-math.inf), kept)
        return teacher_advantages(old, teacher, kept, self.kl_coef, self.discount)

    def describe(self) -> list[str]:
        lines = super().describe()
        if self.loss == "gkd":
            return lines
        future = f", {self.discount:g}-discounted to go" if self.discount else ""
        env = f" + {self.advantage.describe()}" if self.advantage is not None else ""
        return [f"advantage: {self.kl_coef:g} (log teacher - log policy){future}{env}", *lines]
