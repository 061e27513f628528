# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: group and batch baselines, returns, generalized advantages, whitening.

Rewards are one number a row ``[N]``; NaN means "not scorable": such a row is left out of every mean and deviation and
gets advantage 0. Statistics over the batch are sums passed through ``all_reduce``, so any number of ranks gives the
same result; a group never straddles ranks. Everything here is computed in float64, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all ranks."""

# Relative size below which a spread of float64 statistics is rounding, not signal.
_ROUNDING = 1e-12


def identity(value: Tensor) -> Tensor:
    """The ``all_reduce`` of a run with one rank."""
    return value


@dataclass
class AdvantageNormalizer:
    """Advantage of each row from the rewards of its group or of the batch.

    | method | center | scale | other |
    | --- | --- | --- | --- |
    | GRPO (arXiv 2402.03300) | group | group | |
    | Dr.GRPO (arXiv 2503.20783) | group | none | |
    | RLOO (arXiv 2402.14740) | group | none | leave_one_out |
    | REINFORCE++ (arXiv 2501.03262) | batch | batch | level="token" |
    | REINFORCE++-baseline | group | batch | level="token" |

    Rows of a group without spread, or of a group of one, carry no signal and get exactly 0 whenever ``center`` or
    ``scale`` is "group"; all rows do when the batch has no spread and ``center`` or ``scale`` is "batch".

    With ``center="group", scale="batch"`` the deviation is that of the rewards (as in TRL), except with
    ``leave_one_out`` (the deviation of the leave-one-out advantages, RLOO's ``normalize_advantages``) and with
    ``level="token"`` (centred rewards are whitened: their mean over trained tokens is subtracted as well).

    Args:
        center: whose mean reward is the baseline.
        scale: whose standard deviation divides the centred reward.
        leave_one_out: multiply the centred reward by n/(n-1), n the scorable rows of the group: the baseline becomes
            the mean of the *other* rows. Needs ``center="group"``.
        ddof: 1 for the sample deviation (n-1), 0 for the population deviation.
        eps: added to the deviation; verl uses 1e-6, TRL 1e-4.
        level: "token" counts a row in batch statistics as often as it has trained tokens.

    Raises:
        ValueError: a combination that has no meaning.
    """

    center: Literal["group", "batch", "none"] = "group"
    scale: Literal["group", "batch", "none"] = "group"
    leave_one_out: bool = False
    ddof: int = 1
    eps: float = 1e-6
    level: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        for name in ("center", "scale"):
            if getattr(self, name) not in ("group", "batch", "none"):
                raise ValueError(f"{name} must be 'group', 'batch' or 'none', got {getattr(self, name)!r}.")
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level must be 'sequence' or 'token', got {self.level!r}.")
        if self.leave_one_out and self.center != "group":
            raise ValueError(
                f"leave_one_out=True averages the other rows of a group: set center='group' (it is {self.center!r})."
            )
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {self.ddof}.")
        if self.eps < 0:
            raise ValueError(f"eps is added to a standard deviation and must be at least 0, got {self.eps}.")
        if self.level == "token" and "batch" not in (self.center, self.scale):
            raise ValueError("level='token' changes statistics over the batch only: set center or scale to 'batch'.")

    @torch.no_grad()
    def __call__(
        self, rewards: Tensor, group: Tensor, weights: Tensor | None = None, all_reduce: AllReduce = identity
    ) -> Tensor:
        """Advantage of each row.

        Args:
            rewards: ``[N]``, NaN where not scorable.
            group: ``[N]`` integers; groups of any size, in any order.
            weights: ``[N, T]``, non-zero where a token trains; needed with ``level="token"``.
            all_reduce: sum over ranks.

        Returns:
            ``[N]``, in the dtype of ``rewards``.
        """
        scorable = ~rewards.isnan()
        values = rewards.double().masked_fill(~scorable, 0.0)  # [N]
        groups = _group_moments(values, scorable, group, self.ddof)
        counts = self._batch_counts(scorable, weights)

        centred, batch_values = values, values
        if self.center == "group":
            centred = values - groups.mean
            if self.leave_one_out:
                centred = centred * groups.size / (groups.size - 1).clamp(min=1)
            if self.leave_one_out or self.level == "token":
                batch_values = centred

        advantages, silent = centred, ~scorable
        if "group" in (self.center, self.scale):
            silent = silent | groups.flat
        if "batch" in (self.center, self.scale):
            batch = _batch_moments(batch_values, counts, self.ddof, all_reduce)
            silent = silent | batch.flat
            if self.center == "batch" or (self.center == "group" and self.level == "token"):
                advantages = advantages - batch.mean
            if self.scale == "batch":
                advantages = advantages / (batch.std + self.eps)
        if self.scale == "group":
            advantages = advantages / (groups.std + self.eps)
        return advantages.masked_fill(silent, 0.0).to(_float_dtype(rewards))

    def _batch_counts(self, scorable: Tensor, weights: Tensor | None) -> Tensor:
        """How often each row counts in statistics over the batch. ``[N]`` float64."""
        if self.level == "sequence":
            return scorable.double()
        if weights is None:
            raise ValueError("level='token' needs weights [N, T]: which tokens train.")
        return (weights != 0).sum(1).double() * scorable

    def describe(self) -> str:
        """The formula in one line, for the header of a run."""
        whitened = self.center == "group" and self.scale == "batch" and (self.level == "token" or self.leave_one_out)
        baseline = {"group": "r - mean_group", "batch": "r - mean_batch", "none": "r"}[self.center]
        if self.leave_one_out:
            baseline = f"n/(n-1) ({baseline})"
        notes = ["population std"] if self.ddof == 0 and self.scale != "none" else []
        if self.level == "token":
            notes.append("batch statistics over trained tokens")
        if whitened:
            centre = "c - mean_batch(c)" if self.level == "token" else "c"
            numerator = f"({centre})" if self.level == "token" else centre
            formula = f"{numerator} / (std_batch(c) + {self.eps:g}), c = {baseline}"
        elif self.scale == "none":
            formula = baseline
        else:
            numerator = baseline if self.leave_one_out or self.center == "none" else f"({baseline})"
            formula = f"{numerator} / (std_{self.scale} + {self.eps:g})"
        return "; ".join([f"A = {formula}", *notes])


class _GroupMoments(NamedTuple):
    """Statistics of each row's group, spread back over the rows. All ``[N]``."""

    size: Tensor
    mean: Tensor
    std: Tensor
    flat: Tensor


class _BatchMoments(NamedTuple):
    """Statistics over all ranks. All scalars."""

    mean: Tensor
    std: Tensor
    flat: Tensor


def _group_moments(values: Tensor, scorable: Tensor, group: Tensor, ddof: int) -> _GroupMoments:
    ids, row_group = torch.unique(group, return_inverse=True)  # [G], [N]
    zeros = values.new_zeros(len(ids))
    size = zeros.index_add(0, row_group, scorable.to(values))
    mean = zeros.index_add(0, row_group, values) / size.clamp(min=1)
    squares = (values - mean[row_group]).square() * scorable
    std = (zeros.index_add(0, row_group, squares) / (size - ddof).clamp(min=1)).sqrt()
    # Equal rewards do not always average to themselves, so flatness is judged by the extremes.
    low = zeros.scatter_reduce(0, row_group, values.masked_fill(~scorable, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, row_group, values.masked_fill(~scorable, -torch.inf), "amax", include_self=False)
    return _GroupMoments(size[row_group], mean[row_group], std[row_group], (low >= high)[row_group])


def _batch_moments(values: Tensor, counts: Tensor, ddof: int, all_reduce: AllReduce) -> _BatchMoments:
    """Weighted moments in two passes: a single pass loses the variance of rewards with a large mean."""
    total, first, second = all_reduce(
        torch.stack([counts.sum(), (counts * values).sum(), (counts * values.square()).sum()])
    )
    mean = first / total.clamp(min=1)
    squares = all_reduce((counts * (values - mean).square()).sum())
    std = (squares / (total - ddof).clamp(min=1)).sqrt()
    return _BatchMoments(mean, std, squares <= _ROUNDING**2 * second)


def _float_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.get_default_dtype()


@torch.no_grad()
def gdpo_advantages(
    terms: Mapping[str, Tensor],
    weights: Mapping[str, float | Tensor],
    group: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    trained: Tensor | None = None,
    all_reduce: AllReduce = identity,
) -> Tensor:
    """GDPO: normalise every reward in its group, add them up with their weights, whiten over the batch.

    Summing raw rewards first lets different combinations collapse to one number; normalising first keeps them apart.
    A term that is NaN for a row adds nothing to it; a row without any scorable term is left out and gets 0.

    Args:
        terms: raw rewards by name, each ``[N]``.
        weights: weight of each term, a number or ``[N]``; the same names as ``terms``.
        group: ``[N]`` integers.
        ddof: 1 for the sample deviation, 0 for the population deviation.
        eps: added to each deviation.
        trained: ``[N, T]``, non-zero where a token trains. Given, the whitening is over tokens (verl); otherwise over
            rows (TRL).
        all_reduce: sum over ranks.

    Returns:
        ``[N]`` advantages.

    Raises:
        ValueError: no term, or names of terms and weights differ.
    """
    if not terms or set(terms) != set(weights):
        raise ValueError(f"terms and weights must have the same names, got {sorted(terms)} and {sorted(weights)}.")
    normalize = AdvantageNormalizer("group", "group", ddof=ddof, eps=eps)
    total = sum((weights[name] * normalize(terms[name].double(), group) for name in terms), torch.zeros(()))
    unscorable = torch.stack([terms[name].isnan() for name in terms]).all(0)
    level: Literal["sequence", "token"] = "sequence" if trained is None else "token"
    whitener = AdvantageNormalizer("batch", "batch", ddof=ddof, eps=eps, level=level)
    advantages = whitener(total.masked_fill(unscorable, torch.nan), group, trained, all_reduce)
    return advantages.to(_float_dtype(next(iter(terms.values()))))


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor, all_reduce: AllReduce = identity, eps: float = 1e-8) -> Tensor:
    """``(v - mean) / sqrt(var + eps)`` over the entries where ``mask`` is true; 0 elsewhere.

    The variance is unbiased. One valid entry, or equal entries, give 0.

    Args:
        values: any shape.
        mask: the same shape; entries outside may hold anything.
        all_reduce: sum over ranks.
        eps: added to the variance.
    """
    valid = mask.bool()
    inside = values.double().masked_fill(~valid, 0.0)
    moments = _batch_moments(inside.flatten(), valid.double().flatten(), 1, all_reduce)
    whitened = (inside - moments.mean) * (moments.std.square() + eps).rsqrt()
    return whitened.masked_fill(~valid | moments.flat, 0.0).to(_float_dtype(values))


@torch.no_grad()
def discounted_returns(token_rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted reward-to-go ``G_t = r_t + gamma G_{t+1}`` over valid tokens.

    Tokens outside the mask (padding, tool output) have return 0, and the return passes across them undiscounted.

    Args:
        token_rewards: ``[N, T]``; ignored outside the mask.
        mask: ``[N, T]``, true where the policy wrote the token.
        gamma: discount in [0, 1].

    Returns:
        ``[N, T]``.
    """
    no_values = torch.zeros_like(token_rewards)
    return generalized_advantages(token_rewards, no_values, mask, gamma, lam=1.0)[0]


@torch.no_grad()
def generalized_advantages(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16) along each completion.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with V = 0 after the last valid
    token (a completion is an episode that ends). Tokens outside the mask inside a completion, such as tool output, have
    no delta; the next value and advantage pass across them unchanged.

    Args:
        token_rewards: ``[N, T]``; ignored outside the mask.
        values: ``[N, T]`` value estimates; ignored outside the mask.
        mask: ``[N, T]``, true where the policy wrote the token.
        gamma: discount in [0, 1].
        lam: bias-variance trade-off in [0, 1]; 1 is the Monte-Carlo return minus the value.

    Returns:
        Advantages and returns ``A_t + V_t``, both ``[N, T]``, not whitened, 0 outside the mask.

    Raises:
        ValueError: ``gamma`` or ``lam`` outside [0, 1].
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    valid = mask.bool()
    rewards = token_rewards.double().masked_fill(~valid, 0.0)
    baseline = values.double().masked_fill(~valid, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))  # [N]
    for t in reversed(range(rewards.shape[1])):
        here = valid[:, t]
        delta = rewards[:, t] + gamma * next_value - baseline[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, baseline[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.masked_fill(~valid, 0.0)
    dtype = _float_dtype(token_rewards)
    return advantages.to(dtype), (advantages + baseline).to(dtype)
