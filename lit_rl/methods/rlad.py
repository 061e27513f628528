# SPDX-License-Identifier: Apache-2.0
"""Reinforcement-aware distillation: the teacher moves the trust region, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.grpo import GRPO
from lit_rl.methods.teaching import Taught
from lit_rl.methods.terms import Current, PolicyTerm, Signals, Term
from lit_rl.objectives import Aggregation, Clip, Surrogate
from lit_rl.policies import FrozenPolicy, Policy
from lit_rl.rollouts import Rollouts


def trust_region_anchor(old_logprobs: Tensor, teacher_logprobs: Tensor, old_policy_weight: float) -> Tensor:
    r"""Log of the anchor :math:`\pi_{old}^\alpha\,\pi_T^{1-\alpha}` of each sampled token, without gradient.

    The mixture is geometric, token-wise and not normalised over the vocabulary (RLAD, equation of the TRRD ratio).

    Args:
        old_logprobs: any shape.
        teacher_logprobs: the same shape; not read at weight 1. NaN where no teacher scored: the old policy is the
            anchor there.
        old_policy_weight: α, the share of the *old policy*: 1 is GRPO, 0 a ratio against the teacher alone.
    """
    old = old_logprobs.detach()
    if old_policy_weight == 1:
        return old
    mixed = old_policy_weight * old + (1 - old_policy_weight) * teacher_logprobs.detach()
    return torch.where(torch.isnan(teacher_logprobs), old, mixed.to(old.dtype))


class RLAD(Taught, GRPO):
    r"""RLAD with trust region ratio distillation (arXiv 2602.22495).

    GRPO whose ratio is taken against a mixture of old policy and teacher,
    :math:`r = \pi_\theta / (\pi_{old}^\alpha \pi_T^{1-\alpha})`. With a positive advantage the update may go up to the
    teacher's region, with a negative one the teacher's favourite tokens are protected, and where the advantage is 0 the
    teacher has no influence. So r is not 1 at the first update, and one update a rollout is not REINFORCE.

    Reconstructed: α, clip and KL coefficient of the paper's runs are not known; 0.5 is a third party's.

    Args:
        policy: the student.
        teacher: who moves the trust region.
        old_policy_weight: α, the old policy's share of the anchor; may be scheduled (1: the teacher has faded out).
        surrogate: default PPO's clip at 0.2 without the dual clip; ``Clip(dual_clip=3)`` bounds the punishment of
            tokens that the teacher dislikes, which is a guard of ours.
        aggregation: the written objective takes means of rows.
        kwargs: arguments of `GRPO`.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: FrozenPolicy | Sequence[FrozenPolicy],
        old_policy_weight: float = 0.5,
        surrogate: Surrogate | None = None,
        aggregation: Aggregation = Aggregation.SEQUENCE_MEAN,
        **kwargs: Any,
    ) -> None:
        if not 0 <= old_policy_weight <= 1:
            raise ValueError(f"old_policy_weight is the old policy's share, in [0, 1]; got {old_policy_weight}.")
        self.teach_by(teacher)
        super().__init__(policy, surrogate=surrogate or Clip(), aggregation=aggregation, **kwargs)
        self.old_policy_weight = old_policy_weight

    def terms(self) -> list[Term]:
        first, *others = super().terms()
        assert isinstance(first, PolicyTerm)
        shape: dict[str, Any] = {"aggregation": first.aggregation, "max_length": first.max_length}
        return [AnchoredTerm(self, self.surrogate, self.correction, origins=first.origins, **shape), *others]

    def describe(self) -> list[str]:
        anchor = f"old^{self.old_policy_weight:g} teacher^{1 - self.old_policy_weight:g}"
        return [*super().describe(), f"ratio: policy / ({anchor})"]


class AnchoredTerm(PolicyTerm):
    """The policy term with its ratio against the mixture of old policy and teacher."""

    def __init__(self, module: RLAD, surrogate: Any, correction: Any = None, **kwargs: Any) -> None:
        super().__init__(surrogate, correction, **kwargs)
        self.module = module
        self.requires = self.requires | {"logprobs.teacher"}

    def anchor(self, batch: Rollouts, current: Current) -> Tensor:
        old = self.old_logprobs(batch, current)
        return trust_region_anchor(old, batch.logprobs["teacher"], self.module.old_policy_weight)

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        trained = (self.trained(batch) != 0) & (batch.advantages != 0)
        log_ratio = current.logprobs.detach() - self.anchor(batch, current)
        gap = batch.logprobs["teacher"] - self.old_logprobs(batch, current)
        signals.mean("rlad/log_ratio", log_ratio, trained)
        signals.mean("rlad/teacher_gap", gap, trained & ~torch.isnan(gap))
        if isinstance(self.surrogate, Clip):
            up, down = batch.advantages > 0, batch.advantages < 0
            ratio = log_ratio.exp()
            signals.mean("rlad/ratio", ratio, trained)
            signals.mean("rlad/blocked_up", (ratio > 1 + self.surrogate.clip_high).float(), trained & up)
            signals.mean("rlad/blocked_down", (ratio < 1 - self.surrogate.clip_low).float(), trained & down)
            signals.largest("rlad/ratio_max_punished", ratio, trained & down)
        return super().values(batch, current, signals)
