# SPDX-License-Identifier: Apache-2.0
"""Margin calibration of Uni-OPD: the teacher must not rank a wrong completion above a right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.methods.terms import PolicyTerm
from lit_rl.rollouts import Rollouts

Mode = Literal["mean", "minmax"]
Shift = Literal["both", "correct_up", "incorrect_down"]


def margin_of(guidance: Sequence[float], right: Sequence[bool], mode: Mode) -> float:
    """How far right completions lead wrong ones; NaN if one of the two kinds is absent."""
    good = [g for g, r in zip(guidance, right) if r]
    bad = [g for g, r in zip(guidance, right) if not r]
    if not good or not bad:
        return math.nan
    return sum(good) / len(good) - sum(bad) / len(bad) if mode == "mean" else min(good) - max(bad)


def greedy_mask(
    guidance: Sequence[float], right: Sequence[bool], target: float, mode: Mode, retain: float
) -> list[int]:
    """Completions to silence, in order: the worst right or the best wrong one, as long as the margin strictly grows.

    Args:
        guidance: mean advantage of each completion.
        right: its verdict.
        target: margin at which to stop.
        mode: see `margin_of`.
        retain: share of each kind that stays, at least one.

    Returns:
        Indices.
    """
    kept = list(range(len(guidance)))
    least = {kind: max(1, math.floor(retain * sum(r == kind for r in right))) for kind in (True, False)}
    removed: list[int] = []

    def margin(rows: Sequence[int]) -> float:
        return margin_of([guidance[i] for i in rows], [right[i] for i in rows], mode)

    while (now := margin(kept)) < target:
        candidates = []
        for kind, pick in ((True, min), (False, max)):  # the right kind first: it wins a tie
            members = [i for i in kept if right[i] == kind]
            if len(members) > least[kind]:
                candidates.append(pick(members, key=lambda i: guidance[i]))
        options = [(margin([j for j in kept if j != i]), i) for i in candidates]
        best = max(options, key=lambda o: o[0], default=None)
        if best is None or not best[0] > now:
            break
        kept.remove(best[1])
        removed.append(best[1])
    return removed


class MarginCalibration(RolloutCallback):
    r"""Outcome-guided margin calibration of Uni-OPD (arXiv 2605.03677).

    The guidance :math:`G_i` of a completion is the mean of its token advantages. Where right completions do not lead
    wrong ones by δ, one constant is added to all their tokens, so that they lead by exactly δ; the pattern within a
    completion stays. With ``method="mask"`` completions that spoil the order are silenced instead.

    Works with methods whose advantages come from a teacher, `OPD` with ``loss="policy_gradient"`` and `GOPD`.

    Args:
        margin: δ (paper: 0.4 on text with mean and both, 0 on images with minmax and correct_up).
        mode: lead of the means, or of the worst right over the best wrong completion.
        scope: within each prompt's group, or over all completions of the step on all ranks.
        shift: raise the right ones (Lift), lower the wrong ones, or half of each (Spread).
        method: ``"shift"``, or ``"mask"``: greedily silence completions (never together).
        retain: share of each kind that masking leaves, at least one.
        max_gap: tokens whose log-probabilities under policy and teacher are this far apart get advantage 0, as do
            tokens that the teacher did not score; they still count in the mean. None: no bound. (The released code
            looks at the policy of each update, this at the one that sampled.)
    """

    requires = frozenset({"correct", "logprobs.teacher", "logprobs.old"})

    def __init__(
        self,
        margin: float = 0.4,
        mode: Mode = "mean",
        scope: Literal["group", "global"] = "group",
        shift: Shift = "both",
        method: Literal["shift", "mask"] = "shift",
        retain: float = 0.25,
        max_gap: float | None = 10.0,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, ("mean", "minmax")),
            ("scope", scope, ("group", "global")),
            ("shift", shift, ("both", "correct_up", "incorrect_down")),
            ("method", method, ("shift", "mask")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if not 0 <= retain <= 1:
            raise ValueError(f"retain is a share, in [0, 1]; got {retain}.")
        self.margin, self.mode, self.scope, self.shift = margin, mode, scope, shift
        self.method, self.retain, self.max_gap = method, retain, max_gap

    def check_setup(self, module: Any) -> None:
        """Advantages must be what the loss is made of."""
        if not any(isinstance(term, PolicyTerm) for term in module.loss_terms):
            raise ValueError(
                f"MarginCalibration moves advantages, but {type(module).__name__} is trained without any: use "
                "loss='policy_gradient'."
            )

    def on_advantages(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Shift or silence, then cut the tokens on which policy and teacher are worlds apart."""
        kept = rollouts.kept_mask()
        advantages = torch.where(kept, rollouts.advantages, 0.0)
        guidance = advantages.double().sum(1) / kept.sum(1).clamp(min=1)
        scope = rollouts.group if self.scope == "group" else torch.zeros_like(rollouts.group)
        constant, silent, numbers = self.calibrate(guidance, rollouts.correct, scope)
        advantages = torch.where(kept, advantages + constant[:, None].to(advantages.dtype), 0.0)
        advantages = torch.where(silent[:, None], 0.0, advantages)
        gap = (rollouts.logprobs["old"] - rollouts.logprobs["teacher"]).abs()
        apart = torch.isnan(gap) if self.max_gap is None else ~(gap < self.max_gap)
        rollouts.advantages = torch.where(apart, 0.0, advantages)
        ledger = module.ledger
        ledger.mean("margin/before", numbers["before"])
        ledger.mean("margin/after", numbers["after"])
        ledger.mean("margin/violated_ratio", numbers["violated"])
        ledger.mean("margin/lambda", numbers["lambda"])
        ledger.total("margin/silenced", silent.sum())
        ledger.mean("margin/apart_ratio", apart.float(), kept)

    def calibrate(self, guidance: Tensor, correct: Tensor, scope: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Constant of each completion ``[N]``, which ones are silenced ``[N]``, and what to report about the scopes."""
        mine = slice(0, len(guidance))
        if self.scope == "global":
            everywhere, mine = ranks.all_gather_concat(torch.stack([guidance, correct.to(guidance)], 1))
            guidance, correct = everywhere.unbind(1)
            scope = torch.zeros(len(guidance), dtype=torch.long, device=guidance.device)
        constant, silent = torch.zeros_like(guidance), torch.zeros_like(guidance, dtype=torch.bool)
        numbers: dict[str, list[float]] = {"before": [], "after": [], "violated": [], "lambda": []}
        for s in scope.unique().tolist():
            rows = ((scope == s) & ~torch.isnan(correct)).nonzero()[:, 0]
            values, right = guidance[rows].tolist(), (correct[rows] == 1).tolist()
            margin = margin_of(values, right, self.mode)
            violated = margin < self.margin  # False where a kind is absent: NaN
            if violated and self.method == "mask":
                gone = greedy_mask(values, right, self.margin, self.mode, self.retain)
                silent[rows[gone]] = True
                left = [i for i in range(len(values)) if i not in gone]
                after = margin_of([values[i] for i in left], [right[i] for i in left], self.mode)
            elif violated:
                up, down = self.parts(self.margin - margin)
                moves = [up if r else -down for r in right]
                constant[rows] = torch.tensor(moves, dtype=constant.dtype, device=constant.device)
                after = margin_of([v + m for v, m in zip(values, moves)], right, self.mode)
            else:
                after = margin
            if not math.isnan(margin):
                shifted = self.margin - margin if violated and self.method == "shift" else 0.0
                for name, value in zip(numbers, (margin, after, float(violated), shifted)):
                    numbers[name].append(value)
        return constant[mine], silent[mine], {k: torch.tensor(v, dtype=torch.float32) for k, v in numbers.items()}

    def parts(self, lead: float) -> tuple[float, float]:
        """How much right completions rise and wrong ones fall."""
        return {"correct_up": (lead, 0.0), "incorrect_down": (0.0, lead), "both": (lead / 2, lead / 2)}[self.shift]
