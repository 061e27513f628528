# SPDX-License-Identifier: Apache-2.0
"""Clip-Cov and KL-Cov: restrain the few tokens whose covariance drives entropy down (arXiv 2505.22617).

To first order an update changes the entropy by minus the covariance of an action's log-probability and its advantage,
and a tiny share of tokens carries most of it. Both rules single out tokens over a whole mini-batch, so `select` is
called once before the split into micro-batches. With several ranks, call it on gathered tensors, or the share is taken
of each rank's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_rl.objectives.surrogates import (
    MAX_LOG_RATIO,
    PolicyLoss,
    Surrogate,
    TokenBatch,
    check_bounds,
    clip_cuts,
    clipped_objective,
)


@torch.no_grad()
def token_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Centred cross-product ``(l - mean l)(A - mean A)`` of each token (arXiv 2505.22617).

    Its mean over the valid tokens is their population covariance.

    Args:
        logprobs: ``[N, T]``.
        advantages: ``[N, T]``.
        mask: ``[N, T]``; entries outside may hold anything.

    Returns:
        ``[N, T]`` float64, 0 outside the mask.
    """
    valid = mask.bool()
    count = valid.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        inside = values.double().masked_fill(~valid, 0.0)
        return inside - inside.sum() / count

    return (centred(logprobs) * centred(advantages)).masked_fill(~valid, 0.0)


@torch.no_grad()
def predicted_entropy_change(logits: Tensor, advantages: Tensor, lr: float, natural: bool = True) -> Tensor:
    """First-order entropy change of a softmax policy after one exact policy-gradient step.

    ``-lr Cov(log pi, A)`` for the natural policy gradient, ``-lr Cov(log pi, pi A)`` for the vanilla one, with the
    covariance under the policy itself (arXiv 2505.22617, theorems 2 and 1).

    Args:
        logits: ``[..., V]``.
        advantages: ``[..., V]``.
        lr: step size in logits.
        natural: natural rather than vanilla policy gradient.

    Returns:
        ``[...]`` in nats.
    """
    log_pi = logits.log_softmax(-1)
    pi = log_pi.exp()
    change = advantages if natural else pi * advantages

    def mean(values: Tensor) -> Tensor:
        return (pi * values).sum(-1)

    return -lr * (mean(log_pi * change) - mean(log_pi) * mean(change))


def _share(fraction: float, mask: Tensor) -> int:
    """``max(1, floor(fraction * tokens))``: even a small batch has one selected token, as in the official code."""
    return max(1, math.floor(fraction * int(mask.sum()) + 1e-9))


def _check_fraction(owner: object, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"{type(owner).__name__}: fraction is a share of tokens in (0, 1], got {fraction}.")


@dataclass
class KLCov(Surrogate):
    """KL-Cov (arXiv 2505.22617): the unclipped ratio, with a penalty on the tokens of largest covariance.

    ``-rho A``, plus ``beta |log pi - log pi_old|`` on the ``max(1, floor(fraction * tokens))`` tokens with the largest
    covariance. On the first update after a rollout the penalty and its gradient are 0.

    Args:
        fraction: share of tokens that are penalised: 2e-3 for a 7B, 2e-4 for a 32B model in the paper.
        beta: weight of the penalty.
    """

    selects_over_batch: ClassVar[bool] = True

    fraction: float = 2e-3
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)
        check_bounds(self, beta=self.beta)

    @torch.no_grad()
    def select(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, counter: int = 0
    ) -> Tensor:
        """The tokens of largest covariance, ``[N, T]`` bool. ``counter`` is not used: nothing is random."""
        valid = mask.bool()
        selected = torch.zeros_like(valid)
        if not valid.any():
            return selected
        covariance = token_covariance(logprobs, advantages, valid).masked_fill(~valid, -torch.inf)
        selected.view(-1)[covariance.flatten().topk(_share(self.fraction, valid)).indices] = True
        return selected

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio = batch.log_ratio.exp()
        penalty = self.beta * batch.log_ratio.abs() * batch.selected
        return PolicyLoss(-ratio * batch.advantages + penalty, ratio, batch.selected)

    def describe(self) -> str:
        return (
            f"-rho A a token, + {self.beta:g} |log rho| on the {self.fraction:g} of tokens with the largest covariance"
        )


@dataclass
class ClipCov(Surrogate):
    """Clip-Cov (arXiv 2505.22617): PPO's clip, and a few tokens of high covariance do not train at all.

    Out of the tokens with ``cov_low < covariance < cov_high`` that PPO does not clip already, at most
    ``max(1, floor(fraction * tokens))`` are drawn uniformly; their loss is 0, while they stay in the denominator.

    The draw needs no random generator: each token's priority is a hash of (``seed``, ``counter``, its position in the
    completion, its old log-probability), and the smallest ones win. It therefore depends neither on the order of rows
    nor on padding, and repeats exactly after a resume. Pass another ``counter`` (the optimizer step) at each call.

    Args:
        fraction: share of tokens that are removed.
        cov_low: lower end of the band.
        cov_high: upper end of the band.
        clip_low: PPO's lower clip; the authors' scripts use 1.0, nearly off.
        clip_high: PPO's upper clip.
        seed: seed of the draw.
    """

    selects_over_batch: ClassVar[bool] = True

    fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    clip_low: float = 1.0
    clip_high: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high)

    @torch.no_grad()
    def select(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, counter: int = 0
    ) -> Tensor:
        """The removed tokens, ``[N, T]`` bool.

        Args:
            logprobs: ``[N, T]`` under the current policy.
            old_logprobs: ``[N, T]`` under the policy at the start of the update.
            advantages: ``[N, T]``.
            mask: ``[N, T]``.
            counter: number of this draw, so that draws differ from step to step.
        """
        valid = mask.bool()
        covariance = token_covariance(logprobs, advantages, valid)
        log_ratio = (logprobs - old_logprobs).masked_fill(~valid, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        cut = clip_cuts(log_ratio.exp(), advantages, self.clip_low, self.clip_high) & (advantages != 0)
        candidates = valid & (covariance > self.cov_low) & (covariance < self.cov_high) & ~cut
        number = min(_share(self.fraction, valid), int(candidates.sum()))
        priority = _priorities(old_logprobs.masked_fill(~valid, 0.0), self.seed, counter)
        priority = priority.masked_fill(~candidates, torch.iinfo(torch.int64).max)
        selected = torch.zeros_like(valid)
        selected.view(-1)[priority.flatten().topk(number, largest=False).indices] = True
        return selected

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio, advantages = batch.log_ratio.exp(), batch.advantages
        values = clipped_objective(ratio, advantages, self.clip_low, self.clip_high)
        cut = clip_cuts(ratio, advantages, self.clip_low, self.clip_high)
        return PolicyLoss(values.masked_fill(batch.selected, 0.0), ratio, cut | batch.selected)

    def describe(self) -> str:
        return (
            f"-min(rho A, clip(rho, {1 - self.clip_low:g}, {1 + self.clip_high:g}) A) a token, without "
            f"{self.fraction:g} of the tokens, drawn from covariance in ({self.cov_low:g}, {self.cov_high:g})"
        )


def _priorities(old_logprobs: Tensor, seed: int, counter: int) -> Tensor:
    """Pseudo-random int64 of each token, ``[N, T]``: a hash of the seed, the counter, its position and its content."""
    # Rounded, so that noise in the last bits of a recomputed log-probability changes hardly any draw.
    content = (old_logprobs.double().clamp(-1e6, 0) * 4096).round().long()
    position = torch.arange(old_logprobs.shape[1], device=old_logprobs.device)
    key = torch.tensor([seed, counter], device=old_logprobs.device)
    mixed = _mix(_mix(key[0]) + key[1])
    return _mix(_mix(mixed + position) + content)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 in int64 arithmetic, which wraps around (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; the operator's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
