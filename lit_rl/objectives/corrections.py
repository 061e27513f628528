# SPDX-License-Identifier: Apache-2.0
"""Correction for the gap between the policy that sampled and the policy that trains.

The sampler runs other kernels, another precision and sometimes older weights than the trainer. With
``l = old - sampler`` (log-probabilities of the sampled tokens) and ``rho = exp(l)``, a correction is a weight, a
rejection, or both; neither carries gradient. Where old is the sampler by definition, pass the current log-probabilities
as ``old_logprobs``: then the same functions correct current against sampler.

| known as | weight | reject |
| --- | --- | --- |
| truncated importance sampling, token | token, high C | none |
| IcePop | token | token, [c, C] |
| truncated, sequence | sequence, high C | none |
| masked, sequence (TRL's default, C = 3) | sequence | sequence, high C |
| geometric filter with token weights | token | geometric, [c, C] |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from lit_rl.objectives.advantages import AllReduce

Level = Literal["token", "sequence", "geometric"]

_MAX_LOG_RATIO = 20.0


def log_mismatch(sampler_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """Log-ratio ``log old - log sampler`` at a level, clamped to ±20.

    Args:
        sampler_logprobs: ``[N, T]``, as processed for sampling (temperature, top-p, top-k).
        old_logprobs: ``[N, T]`` under the trainer's policy, processed in the same way.
        mask: ``[N, T]``, true where a token counts; entries outside may hold anything.
        level: "token": each token's own; "sequence": the sum over the row; "geometric": the mean over the row.

    Returns:
        ``[N, T]`` detached, 0 outside the mask.

    Raises:
        ValueError: unknown level.
    """
    valid = mask.bool()
    gap = (old_logprobs.detach() - sampler_logprobs.detach()).masked_fill(~valid, 0.0)
    if level == "sequence":
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    elif level == "geometric":
        gap = (gap.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).expand_as(gap)
    elif level != "token":
        raise ValueError(f"level must be 'token', 'sequence' or 'geometric', got {level!r}.")
    return gap.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).masked_fill(~valid, 0.0)


def importance_weight(
    sampler_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    level: Level = "token",
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Ratio ``old / sampler`` at a level, bounded: truncated with ``high`` alone, clamped with both.

    Args:
        sampler_logprobs: ``[N, T]``.
        old_logprobs: ``[N, T]``.
        mask: ``[N, T]``.
        level: see `log_mismatch`.
        low: smallest weight; None for no bound.
        high: largest weight; None for no bound.

    Returns:
        ``[N, T]`` detached, 0 outside the mask.
    """
    ratio = log_mismatch(sampler_logprobs, old_logprobs, mask, level).exp()
    return ratio.clamp(min=low or 0.0, max=high).masked_fill(~mask.bool(), 0.0)


def rejection_mask(
    sampler_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    level: Level = "token",
    low: float | None = None,
    high: float | None = None,
    veto: float | None = None,
) -> Tensor:
    """Where the ratio ``old / sampler`` lies in ``[low, high]``.

    Args:
        sampler_logprobs: ``[N, T]``.
        old_logprobs: ``[N, T]``.
        mask: ``[N, T]``.
        level: see `log_mismatch`; beyond "token" a row is kept or dropped as a whole.
        low: smallest ratio that is kept; None for no bound.
        high: largest ratio that is kept; None for no bound.
        veto: drop a whole row if the ratio of any of its tokens lies below this (1e-6 to 1e-4); None for no veto.

    Returns:
        ``[N, T]`` bool, false outside the mask.
    """
    valid = mask.bool()
    ratio = log_mismatch(sampler_logprobs, old_logprobs, valid, level).exp()
    keep = valid & (ratio >= (low or 0.0))
    if high is not None:
        keep = keep & (ratio <= high)
    if veto is not None:
        gap = log_mismatch(sampler_logprobs, old_logprobs, valid, "token")
        keep = keep & ~((gap.exp() < veto) & valid).any(1, keepdim=True)
    return keep


def off_policy_sequence_mask(
    sampler_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, delta: float
) -> Tensor:
    """Keep a token unless A < 0 and its row has drifted: ``mean_t (log sampler - log current) > delta``.

    Failures that the current policy would hardly produce any more teach little and destabilise; successes are kept.

    Args:
        sampler_logprobs: ``[N, T]``.
        logprobs: ``[N, T]`` under the current policy.
        advantages: ``[N, T]``.
        mask: ``[N, T]``.
        delta: largest tolerated drift in nats a token.

    Returns:
        ``[N, T]`` bool, false outside the mask.
    """
    drift = -log_mismatch(sampler_logprobs, logprobs, mask, "geometric")
    return mask.bool() & ((advantages >= 0) | (drift <= delta))


@dataclass
class OffPolicyCorrection:
    """Importance weight and rejection in one detached multiplier of the policy loss.

    Multiply *values* with the result, not the loss weights: a rejected token then contributes 0 and still counts in the
    denominator, so that the tokens that remain are not inflated.

    Args:
        weight: level of the importance weight, or "none" for weight 1.
        weight_low: smallest weight; None for no bound.
        weight_high: largest weight; None for no bound.
        reject: level at which tokens or rows are dropped, or "none".
        reject_low: smallest ratio that is kept; None for no bound.
        reject_high: largest ratio that is kept; None for no bound.
        veto: drop a row if the ratio of any of its tokens lies below this; None for no veto.
    """

    weight: Literal["none", "token", "sequence", "geometric"] = "token"
    weight_low: float | None = None
    weight_high: float | None = 2.0
    reject: Literal["none", "token", "sequence", "geometric"] = "none"
    reject_low: float | None = None
    reject_high: float | None = None
    veto: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "reject"):
            level, low, high = getattr(self, name), getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if level not in ("none", "token", "sequence", "geometric"):
                raise ValueError(f"{name} must be 'none', 'token', 'sequence' or 'geometric', got {level!r}.")
            if low is not None and not 0 <= low <= 1:
                raise ValueError(f"{name}_low bounds a ratio from below and must lie in [0, 1], got {low}.")
            if high is not None and not high >= 1:
                raise ValueError(f"{name}_high bounds a ratio from above and must be at least 1, got {high}.")
        if self.reject == "none" and (self.reject_low is not None or self.reject_high is not None):
            raise ValueError(
                "reject_low and reject_high need a level: set reject to 'token', 'sequence' or 'geometric'."
            )
        if self.reject != "none" and self.reject_low is None and self.reject_high is None:
            raise ValueError(f"reject={self.reject!r} without bounds drops nothing: set reject_low or reject_high.")
        if self.veto is not None and not 0 < self.veto < 1:
            raise ValueError(f"veto is a small ratio in (0, 1) such as 1e-4, got {self.veto}.")

    @torch.no_grad()
    def __call__(self, sampler_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Multiplier of each token's loss.

        Args:
            sampler_logprobs: ``[N, T]``.
            old_logprobs: ``[N, T]``.
            mask: ``[N, T]``; entries outside may hold anything.

        Returns:
            ``[N, T]`` detached; 0 where rejected and outside the mask.
        """
        if self.weight == "none":
            weight = mask.bool().to(old_logprobs)
        else:
            weight = importance_weight(
                sampler_logprobs, old_logprobs, mask, self.weight, self.weight_low, self.weight_high
            )
        level: Level = "token" if self.reject == "none" else self.reject
        keep = rejection_mask(sampler_logprobs, old_logprobs, mask, level, self.reject_low, self.reject_high, self.veto)
        return weight * keep

    def describe(self) -> str:
        """The correction in one line, for the header of a run."""
        ratio = {"token": "rho", "sequence": "prod rho", "geometric": "geometric mean of rho"}
        parts = []
        if self.weight != "none":
            parts.append(f"weight {ratio[self.weight]}{_interval(self.weight_low, self.weight_high)}")
        if self.reject != "none":
            parts.append(f"reject unless {ratio[self.reject]}{_interval(self.reject_low, self.reject_high)}")
        if self.veto is not None:
            parts.append(f"drop rows with any rho < {self.veto:g}")
        return "; ".join(parts) + ", rho = old / sampler" if parts else "no off-policy correction"


def _interval(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" in [{low or 0:g}, {'inf' if high is None else format(high, 'g')}]"


@dataclass(frozen=True)
class MismatchSums:
    """What is needed to summarise the gap between sampler and trainer, in a form that adds up over splits and ranks.

    All are float64 scalars: sums over tokens, except ``max_gap``, a maximum.
    """

    tokens: Tensor
    k3: Tensor
    gap: Tensor
    abs_gap: Tensor
    ratio_squared: Tensor
    weight: Tensor
    weight_squared: Tensor
    clipped: Tensor
    max_gap: Tensor

    def merge(self, other: MismatchSums) -> MismatchSums:
        """The sums of both parts together."""
        merged = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return MismatchSums(**merged | {"max_gap": torch.maximum(self.max_gap, other.max_gap)})

    def reduce(self, all_reduce: AllReduce, all_reduce_max: AllReduce) -> MismatchSums:
        """The sums over all ranks, in two collectives: a sum and a maximum."""
        names = [f.name for f in fields(self) if f.name != "max_gap"]
        sums = all_reduce(torch.stack([getattr(self, name) for name in names]))
        return MismatchSums(**dict(zip(names, sums)), max_gap=all_reduce_max(self.max_gap))

    def summary(self) -> dict[str, Tensor]:
        """Numbers to log: ``k3``, ``gap``, ``abs_gap`` are means in nats, ``ess`` and ``clipped`` shares in [0, 1]."""
        tokens = self.tokens.clamp(min=1)
        tiny = torch.finfo(self.weight_squared.dtype).tiny
        return {
            "k3": self.k3 / tokens,
            "gap": self.gap / tokens,
            "abs_gap": self.abs_gap / tokens,
            "max_gap": self.max_gap,
            "chi2": torch.where(self.tokens > 0, self.ratio_squared / tokens - 1, 0.0),
            "ess": self.weight.square() / (tokens * self.weight_squared).clamp(min=tiny),
            "clipped": self.clipped / tokens,
        }


@torch.no_grad()
def mismatch_metrics(
    sampler_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, weight: Tensor | None = None
) -> MismatchSums:
    """Sums that describe the gap between the policy that sampled and the policy that trains.

    Args:
        sampler_logprobs: ``[N, T]``.
        old_logprobs: ``[N, T]`` under the trainer's policy.
        mask: ``[N, T]``; entries outside may hold anything.
        weight: ``[N, T]`` multiplier that was applied (`OffPolicyCorrection`); default the token ratio itself. A token
            whose weight differs from its ratio counts as clipped.

    Returns:
        Sums; their ``summary`` has k3 = mean (rho - 1 - log rho), an estimate of KL(sampler || trainer), gap = mean log
        rho, chi2 = mean rho² - 1 and the effective sample share (sum w)² / (n sum w²).
    """
    valid = mask.bool()
    raw = (old_logprobs.detach().double() - sampler_logprobs.detach().double()).masked_fill(~valid, 0.0)
    gap = raw.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = gap.exp().masked_fill(~valid, 0.0)
    applied = ratio if weight is None else weight.double().masked_fill(~valid, 0.0)
    # Weights may be float32, so "differs" means by more than its rounding.
    clipped = ((applied - ratio).abs() > 1e-5 * ratio) & valid
    return MismatchSums(
        tokens=valid.sum().double(),
        k3=(torch.expm1(gap) - gap).sum(),
        gap=gap.sum(),
        abs_gap=gap.abs().sum(),
        ratio_squared=ratio.square().sum(),
        weight=applied.sum(),
        weight_squared=applied.square().sum(),
        clipped=clipped.sum().double(),
        max_gap=raw.abs().amax() if raw.numel() else raw.new_zeros(()),
    )
