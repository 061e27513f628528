# SPDX-License-Identifier: Apache-2.0
"""Generalised on-policy distillation: how far to go in the teacher's direction, and from where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.opd import OPD
from lit_rl.methods.terms import Term
from lit_rl.objectives import Clip, OffPolicyCorrection, Surrogate
from lit_rl.policies import FrozenPolicy, Policy
from lit_rl.rollouts import Rollouts


def extrapolated_advantages(
    old_logprobs: Tensor, teacher_logprobs: Tensor, reference_logprobs: Tensor | None, scale: float
) -> Tensor:
    r""":math:`\lambda \log\pi_T + (1-\lambda) \log\pi_{ref} - \log\pi_{old}` of each sampled token.

    Its maximum is at :math:`\pi_T^\lambda\,\pi_{ref}^{1-\lambda} / Z`: the reference at 0, the teacher at 1, beyond it
    above 1.

    Args:
        old_logprobs: under the policy that sampled, any shape.
        teacher_logprobs: the same shape.
        reference_logprobs: the same shape; not read at ``scale`` 1, where it cancels.
        scale: λ.
    """
    if scale == 1:
        return teacher_logprobs - old_logprobs
    assert reference_logprobs is not None
    return scale * teacher_logprobs + (1 - scale) * reference_logprobs - old_logprobs


class GOPD(OPD):
    r"""G-OPD (arXiv 2602.12125): on-policy distillation with the teacher's reward scaled, against a chosen reference.

    On-policy distillation maximises :math:`E[\log(\pi_T/\pi_{ref})] - KL(\pi_\theta\|\pi_{ref})` for any reference.
    Here the reward has a factor λ: above 1 the student goes beyond the teacher, in the direction from reference to
    teacher (ExOPD). With the teacher's own model before its reinforcement learning as reference, the reward measures
    exactly what that learning added (reward correction). Note that the KL term then refers to that model, too.

    The advantage replaces everything else: no rewards, no baseline, no normalisation.

    Args:
        policy: the student.
        teacher: who scores; several share the work by data source (one expert a domain).
        reward_scale: λ; may be scheduled.
        reference: π_ref; default: none, which only works at λ = 1. Usual are the student's initial weights
            (`FrozenCopy`, or `AdapterOff` with LoRA), or the teacher's base model (`Checkpoint`).
        surrogate: policy loss; default PPO's clip at 0.2 with the dual clip at 3, as in verl.
        correction: off-policy correction; default truncated importance weights of at most 5 a token.
        kwargs: arguments of `OPD` that are left: ``aggregation``, ``group_size`` and those of `RLModule`.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: FrozenPolicy | Sequence[FrozenPolicy],
        reward_scale: float = 1.25,
        reference: FrozenPolicy | None = None,
        surrogate: Surrogate | None = None,
        correction: OffPolicyCorrection | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= reward_scale < math.inf:
            raise ValueError(f"reward_scale must be a number of at least 0, got {reward_scale}.")
        if reward_scale != 1 and reference is None:
            raise ValueError(
                f"reward_scale={reward_scale} measures the teacher against a reference: set `reference` "
                "(lit_rl.policies.FrozenCopy, for example), or reward_scale=1."
            )
        super().__init__(  # what is given here is no argument of G-OPD
            policy,
            teacher=teacher,
            loss="policy_gradient",
            divergence=None,
            temperature=None,
            distill_coef=1.0,
            on_policy_fraction=1.0,
            sequence_kd=False,
            column="completion",
            kl_coef=1.0,
            discount=0.0,
            advantage=None,
            surrogate=surrogate or Clip(0.2, 0.2, dual_clip=3.0),
            correction=correction or OffPolicyCorrection(weight="token", weight_high=5.0),
            reference=reference,
            **kwargs,
        )
        self.reward_scale = reward_scale

    def terms(self) -> list[Term]:
        (term,) = super().terms()
        if self.reference is not None:
            term.requires = term.requires | {"logprobs.reference"}
        return [term]

    def teacher_advantages(self, rollouts: Rollouts) -> Tensor:
        kept, logprobs = rollouts.kept_mask(), rollouts.logprobs
        reference = logprobs.get("reference")
        found = extrapolated_advantages(logprobs["old"], logprobs["teacher"], reference, self.reward_scale)
        found = torch.where(kept & ~torch.isnan(found), found, 0.0)
        gap = torch.where(kept, logprobs["old"] - logprobs["teacher"], math.nan)
        self.ledger.mean("distill/reverse_kl", gap)
        if reference is not None:
            self.ledger.mean("gopd/reward", torch.where(kept, logprobs["teacher"] - reference, math.nan))
            self.ledger.mean("gopd/kl_reference", torch.where(kept, logprobs["old"] - reference, math.nan))
        self.ledger.mean("gopd/advantage", found, kept)
        self.ledger.mean("gopd/advantage_square", found.square(), kept)
        return found

    def describe(self) -> list[str]:
        lines = [line for line in super().describe() if not line.startswith("advantage")]
        scale = f"{self.reward_scale:g} log teacher {1 - self.reward_scale:+g} log reference"
        return [f"advantage: {'log teacher' if self.reward_scale == 1 else scale} - log policy", *lines]
