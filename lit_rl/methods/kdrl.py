# SPDX-License-Identifier: Apache-2.0
"""KDRL: reinforcement learning and distillation in one policy-gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.methods.grpo import GRPO
from lit_rl.methods.module import RLModule
from lit_rl.methods.teaching import Taught
from lit_rl.methods.terms import Current, PolicyTerm, Signals, Term, TokenTerm
from lit_rl.objectives import KLPenalty
from lit_rl.policies import FrozenPolicy, Policy
from lit_rl.rollouts import Rollouts

Mask = Literal["none", "response", "group"]


def reward_guided_mask(correct: Tensor, group: Tensor, mask: Mask) -> Tensor:
    """``[N]`` bool: rows that are distilled.

    Args:
        correct: ``[N]`` verdicts, NaN where there is none. An unknown row never counts as solved, and is distilled
            unless the mask looks at each response.
        group: ``[N]`` index of each row's prompt.
        mask: ``"none"``: all rows; ``"response"``: rows known to be wrong; ``"group"``: all rows of the groups in which
            no row is right.
    """
    if mask == "none":
        return torch.ones_like(correct, dtype=torch.bool)
    if mask == "response":
        return correct == 0
    solved = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=torch.bool, device=group.device)
    solved[group[correct == 1]] = True
    return ~solved[group]


class KDRL(Taught, GRPO):
    r"""KDRL (arXiv 2506.02208): GRPO without reference, plus a reverse KL to a stronger teacher on the same tokens.

    :math:`L = -J_{GRPO} + \beta\,D`, with D the token mean of a one-sample estimate of
    :math:`KL(\pi_\theta\|\pi_T)` from :math:`R = \log\pi_T - \log\pi_\theta`:

    | ``kd_estimator`` | D | expected gradient |
    | --- | --- | --- |
    | ``k2`` (the paper's choice) | R²/2 | of the reverse KL |
    | ``k3`` | e^R - R - 1 | of the *forward* KL, exponential in R |
    | ``k1_adv`` | R is added to the advantage, β R | of the reverse KL, weighted by the ratio |

    The paper anneals β from 5e-3 to 1e-3 over 80 steps (see ``configs/methods/kdrl.yaml``). Reconstructed: the
    denominator under a mask, and what an unknown verdict means (`reward_guided_mask`).

    Args:
        policy: the student.
        teacher: a stronger policy of the same tokenizer.
        kd_coef: β; may be scheduled.
        kd_estimator: see above.
        kd_mask: which rows are distilled, see `reward_guided_mask`; needs a verifier unless ``"none"``.
        kd_mean: the distillation term is a mean over ``"all"`` tokens, or over the ``"masked"``-in ones alone, which
            makes β stronger where few rows are distilled.
        kwargs: arguments of `GRPO`.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: FrozenPolicy | Sequence[FrozenPolicy],
        kd_coef: float = 5e-3,
        kd_estimator: Literal["k1_adv", "k2", "k3"] = "k2",
        kd_mask: Mask = "none",
        kd_mean: Literal["all", "masked"] = "all",
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (
            ("kd_estimator", kd_estimator, ("k1_adv", "k2", "k3")),
            ("kd_mask", kd_mask, ("none", "response", "group")),
            ("kd_mean", kd_mean, ("all", "masked")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if kd_estimator == "k1_adv" and kd_mean == "masked":
            raise ValueError("kd_mean='masked' is a denominator of its own, which kd_estimator='k1_adv' does not have.")
        self.teach_by(teacher)
        super().__init__(policy, **kwargs)
        self.kd_coef, self.kd_estimator, self.kd_mask, self.kd_mean = kd_coef, kd_estimator, kd_mask, kd_mean

    def terms(self) -> list[Term]:
        first, *others = super().terms()
        assert isinstance(first, PolicyTerm)
        if self.kd_estimator == "k1_adv":
            first.requires = first.requires | self.signals_of_distillation() | {"logprobs.old"}
            return [first, *others]
        shape: dict[str, Any] = {"aggregation": first.aggregation, "max_length": first.max_length}
        return [first, DistillationTerm(self, coefficient="kd_coef", origins=first.origins, **shape), *others]

    def signals_of_distillation(self) -> frozenset[str]:
        """What the distillation reads."""
        return frozenset({"logprobs.teacher"} | ({"correct"} if self.kd_mask != "none" else set()))

    def advantages(self, rollouts: Rollouts) -> Tensor:
        found = super().advantages(rollouts)
        if self.kd_estimator != "k1_adv":
            return found
        gap = rollouts.logprobs["teacher"] - rollouts.logprobs["old"]
        where = rollouts.kept_mask() & ~torch.isnan(gap) & self.distilled(rollouts)[:, None]
        self.ledger.mean("kdrl/log_ratio", gap, where)
        return found + torch.where(where, self.kd_coef * gap, 0.0).to(found.dtype)

    def distilled(self, rollouts: Rollouts) -> Tensor:
        """``[N]`` bool: rows that are distilled; of whole groups."""
        return reward_guided_mask(rollouts.correct, rollouts.group, self.kd_mask)


class DistillationTerm(TokenTerm):
    """β times the sampled reverse KL to the teacher."""

    name = "kd"
    watched = True

    def __init__(self, module: KDRL, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.module = module
        self.penalty = KLPenalty(surrogate=module.kd_estimator, cap=None)  # type: ignore[arg-type]
        self.requires = module.signals_of_distillation()

    def prepare(self, module: RLModule, mini: Rollouts) -> None:
        """Decide about rows while the groups are whole."""
        mini.row["kd_rows"] = self.module.distilled(mini)
        module.ledger.mean("kdrl/distilled_ratio", mini.row["kd_rows"].float())

    def trained(self, batch: Rollouts) -> Tensor:
        weights = torch.where(torch.isnan(batch.logprobs["teacher"]), 0.0, super().trained(batch))
        return weights * batch.row["kd_rows"][:, None] if self.module.kd_mean == "masked" else weights

    def active(self, batch: Rollouts) -> Tensor:
        return super().active(batch) & batch.row["kd_rows"]

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        trained = (self.trained(batch) != 0) & batch.row["kd_rows"][:, None]
        teacher = batch.logprobs["teacher"].nan_to_num(0.0)
        signals.mean("kdrl/log_ratio", teacher - current.logprobs.detach(), trained)
        old = PolicyTerm.old_logprobs(batch, current)
        return self.penalty.values(current.logprobs, teacher, old, trained)

    def describe(self) -> str:
        mask = {"none": "", "response": ", on wrong completions", "group": ", on unsolved groups"}[self.module.kd_mask]
        return f"KL(policy || teacher) differentiated as {self.module.kd_estimator}{mask}"
