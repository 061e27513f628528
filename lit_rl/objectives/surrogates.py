# SPDX-License-Identifier: Apache-2.0
"""Policy losses: how log-probabilities and advantages become something to differentiate.

Every surrogate is a small dataclass with the same call, so one is exchanged for another by naming it. Notation:
``d = logprobs - old_logprobs`` (clamped to ±20), ``rho = exp(d)``, A the advantage. Scalar attributes are read at each
call and may be scheduled during a run.

The two surrogates that look at the whole mini-batch (Clip-Cov, KL-Cov) are in `lit_rl.objectives.covariance`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of every log-ratio: e^20 is still far inside float32."""


class PolicyLoss(NamedTuple):
    """What a surrogate returns."""

    values: Tensor
    """The loss to differentiate: ``[N, T]`` of a token-level, ``[N]`` of a sequence-level surrogate. 0 where masked."""
    ratio: Tensor
    """Importance ratio that the rule looked at, ``[N, T]``, detached (a row's ratio stands on each of its tokens);
    0 where masked."""
    clipped: Tensor
    """``[N, T]`` bool: where the rule intervened: it cut the gradient, bounded its coefficient or (KL-Cov) added a
    penalty. Never where the advantage is 0."""


class TokenBatch(NamedTuple):
    """Inputs of a surrogate after cleaning: every tensor ``[N, T]``, finite and 0 outside ``mask``."""

    logprobs: Tensor
    old_logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    selected: Tensor

    def row_mean(self, values: Tensor) -> Tensor:
        """Mean over each row's valid tokens, ``[N]``; 0 for a row without any."""
        return (values * self.mask).sum(1) / self.mask.sum(1).clamp(min=1)

    def on_tokens(self, row_values: Tensor) -> Tensor:
        """A row's number ``[N]`` written on each of its tokens, ``[N, T]``."""
        return row_values.unsqueeze(1).expand_as(self.log_ratio)


class Surrogate(ABC):
    """Base of all policy losses. A subclass writes ``loss`` on clean inputs and says itself what it is."""

    level: ClassVar[Literal["token", "sequence"]] = "token"
    """Shape of the values: "token" ``[N, T]`` or "sequence" ``[N]``."""
    selects_over_batch: ClassVar[bool] = False
    """True if ``select`` must be called once over the whole mini-batch before it is split."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        selected: Tensor | None = None,
    ) -> PolicyLoss:
        """Loss of each token or row.

        Args:
            logprobs: ``[N, T]`` under the current policy, with gradient.
            old_logprobs: ``[N, T]`` under the policy at the start of the update.
            advantages: ``[N, T]``.
            mask: ``[N, T]``, true where a token trains. Entries outside may hold anything, even inf or NaN.
            selected: ``[N, T]`` result of ``select`` over the whole mini-batch, for surrogates that select.
        """
        valid = mask.bool()
        if selected is None:
            selected = self.select(logprobs, old_logprobs, advantages, valid)
        current = _clean(logprobs, valid)
        old = _clean(old_logprobs.detach(), valid)
        batch = TokenBatch(
            logprobs=current,
            old_logprobs=old,
            log_ratio=(current - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO),
            advantages=_clean(advantages.detach(), valid),
            mask=valid,
            selected=selected.bool() & valid,
        )
        values, ratio, clipped = self.loss(batch)
        kept = valid if values.dim() == 2 else valid.any(1)
        return PolicyLoss(
            values=values.masked_fill(~kept, 0.0),
            ratio=ratio.detach().masked_fill(~valid, 0.0),
            clipped=clipped.detach() & valid & (batch.advantages != 0),
        )

    def select(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, counter: int = 0
    ) -> Tensor:
        """Tokens that the rule singles out over the mini-batch, ``[N, T]`` bool; none for most surrogates."""
        return torch.zeros_like(mask, dtype=torch.bool)

    @abstractmethod
    def loss(self, batch: TokenBatch) -> PolicyLoss:
        """Values, ratio and clipped entries; what is outside the mask is removed by the caller."""

    @abstractmethod
    def describe(self) -> str:
        """The formula in one line, for the header of a run."""


def _clean(values: Tensor, valid: Tensor) -> Tensor:
    """Zero outside ``valid``, where no gradient flows back; half precision is widened before ratios are taken."""
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return wide.masked_fill(~valid, 0.0)


def check_bounds(owner: object, **bounds: float | None) -> None:
    """Refuse a negative or NaN bound; None means that the bound is off."""
    for name, value in bounds.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 0, got {value}.")


def clip_cuts(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Where the PPO clip cuts the gradient: the ratio has left the trust region in the advantage's direction."""
    return torch.where(advantages >= 0, ratio > 1 + clip_high, ratio < 1 - clip_low)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` (PPO, arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


@dataclass
class Clip(Surrogate):
    """PPO's clipped ratio (arXiv 1707.06347); asymmetric bounds are DAPO's clip-higher (arXiv 2503.14476).

    ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``

    Args:
        clip_low: how far the ratio may fall below 1.
        clip_high: how far the ratio may rise above 1; DAPO 0.28.
        dual_clip: upper bound c on the loss ``c |A|`` of tokens with A < 0 (verl 3.0); None for no bound.
        delta: TRL's name and place for the same bound: caps rho inside the first term. Must exceed 1 + clip_high.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.dual_clip is not None and self.delta is not None:
            raise ValueError(
                "Clip: dual_clip and delta bound the same loss (A < 0, large ratio); set only one of them."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"Clip: dual_clip must exceed 1, or tokens at ratio 1 do not train; got {self.dual_clip}.")
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"Clip: delta must exceed 1 + clip_high = {1 + self.clip_high:g}, got {self.delta}.")

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio, advantages = batch.log_ratio.exp(), batch.advantages
        values = clipped_objective(ratio, advantages, self.clip_low, self.clip_high)
        clipped = clip_cuts(ratio, advantages, self.clip_low, self.clip_high)
        bound = self.dual_clip if self.delta is None else self.delta
        if bound is not None:
            values = torch.where(advantages < 0, torch.minimum(values, -bound * advantages), values)
            clipped = clipped | ((advantages < 0) & (ratio > bound))
        return PolicyLoss(values, ratio, clipped)

    def describe(self) -> str:
        text = f"-min(rho A, clip(rho, {1 - self.clip_low:g}, {1 + self.clip_high:g}) A) a token"
        bound = self.dual_clip if self.delta is None else self.delta
        return text if bound is None else f"{text}, at most {bound:g} |A| where A < 0"


@dataclass
class GSPO(Surrogate):
    """Clipped length-normalised sequence ratio (arXiv 2507.18071, eq. 5 and 7).

    ``s = exp(mean_t d)`` and ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)``, one number a row. log s is
    capped at 10 (as in verl). Where advantages differ inside a row, A is their mean over its tokens.

    Args:
        clip_low: how far s may fall below 1. Far smaller than token clips, because s is a geometric mean.
        clip_high: how far s may rise above 1.
    """

    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high)

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        log_ratio = batch.row_mean(batch.log_ratio)  # [N]
        ratio, advantages = log_ratio.clamp(max=10.0).exp(), batch.row_mean(batch.advantages)
        values = clipped_objective(ratio, advantages, self.clip_low, self.clip_high)
        clipped = clip_cuts(ratio, advantages, self.clip_low, self.clip_high) | (log_ratio > 10.0)
        return PolicyLoss(values, batch.on_tokens(ratio), batch.on_tokens(clipped))

    def describe(self) -> str:
        return f"-min(s A, clip(s, {1 - self.clip_low:g}, {1 + self.clip_high:g}) A) a row, s = exp(mean log rho)"


@dataclass
class CISPO(Surrogate):
    """REINFORCE with a bounded, detached ratio: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585).

    ``-sg(bound(rho)) A log pi``

    Args:
        clip_low: lower bound; None for none.
        clip_high: upper bound.
        absolute: True (TRL): the bounds are values of rho, ``rho <= clip_high``, 5.0 advised. False (verl): they are
            distances from 1, ``1 - clip_low <= rho <= 1 + clip_high``.
    """

    clip_low: float | None = None
    clip_high: float = 5.0
    absolute: bool = True

    def __post_init__(self) -> None:
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.absolute and self.clip_high < 1:
            raise ValueError(
                f"CISPO: with absolute=True clip_high bounds the ratio itself and must be at least 1, got "
                f"{self.clip_high}; set absolute=False for a distance from 1."
            )

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest coefficient."""
        if self.absolute:
            return (self.clip_low or 0.0), self.clip_high
        return (0.0 if self.clip_low is None else 1 - self.clip_low), 1 + self.clip_high

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        low, high = self.bounds()
        ratio = batch.log_ratio.detach().exp()
        values = -ratio.clamp(low, high) * batch.advantages * batch.logprobs
        return PolicyLoss(values, ratio, (ratio < low) | (ratio > high))

    def describe(self) -> str:
        low, high = self.bounds()
        return f"-sg(clip(rho, {low:g}, {high:g})) A log pi a token"


@dataclass
class Reinforce(Surrogate):
    """Policy gradient ``-A log pi``, for one update on tokens of the current policy; the ratio is only reported."""

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio = batch.log_ratio.detach().exp()
        return PolicyLoss(-batch.advantages * batch.logprobs, ratio, torch.zeros_like(batch.mask))

    def describe(self) -> str:
        return "-A log pi a token"


@dataclass
class GMPO(Surrogate):
    """Geometric mean of clipped token ratios (geometric-mean policy optimization).

    ``u_t = sgn(A) min(sgn(A) d_t, sgn(A) clip(d_t, -clip_low, clip_high))``, loss ``-A exp(mean_t u_t)``, one number a
    row. Where advantages differ inside a row, A is their mean over its tokens.

    Args:
        clip_low: how far a token's log-ratio may fall below 0.
        clip_high: how far a token's log-ratio may rise above 0.
    """

    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high)

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        advantages = batch.row_mean(batch.advantages)  # [N]
        sign = batch.on_tokens(advantages.sign())
        log_ratio = batch.log_ratio
        bounded = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-self.clip_low, self.clip_high))
        ratio = batch.row_mean(bounded).exp()
        clipped = torch.where(sign > 0, log_ratio > self.clip_high, log_ratio < -self.clip_low)
        return PolicyLoss(-advantages * ratio, batch.on_tokens(ratio), clipped)

    def describe(self) -> str:
        return f"-A exp(mean_t clip(log rho, -{self.clip_low:g}, {self.clip_high:g})) a row, clipped in A's direction"


@dataclass
class SAPO(Surrogate):
    """Soft gate instead of a clip: ``-A (4/tau) sigmoid(tau (rho - 1))``, slope 1 at rho = 1.

    Args:
        tau_positive: sharpness of the gate where A > 0.
        tau_negative: sharpness of the gate elsewhere; larger dampens harmful tokens sooner.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SAPO: {name} must exceed 0, got {getattr(self, name)}.")

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio, advantages = batch.log_ratio.exp(), batch.advantages
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        values = -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1))
        return PolicyLoss(values, ratio, torch.zeros_like(batch.mask))

    def describe(self) -> str:
        return (
            f"-A (4/tau) sigmoid(tau (rho - 1)) a token, tau {self.tau_positive:g} if A > 0 else {self.tau_negative:g}"
        )


@dataclass
class VESPO(Surrogate):
    """REINFORCE with a smooth weight of the whole row's ratio, as implemented in TRL and verl.

    ``w = exp(sum_t d_t)`` with log w in [ln 1e-8, 20], ``phi = exp(lam + k ln w - lam w)``, loss ``-sg(phi) A log pi``
    a token; phi is 1 at w = 1 and vanishes for w -> 0 and w -> infinity.

    Args:
        k_positive: exponent k where A >= 0.
        lam_positive: decay lam where A >= 0.
        k_negative: exponent k where A < 0.
        lam_negative: decay lam where A < 0.
    """

    k_positive: float = 2.0
    lam_positive: float = 3.0
    k_negative: float = 3.0
    lam_negative: float = 2.0

    def __post_init__(self) -> None:
        check_bounds(self, k_positive=self.k_positive, lam_positive=self.lam_positive)
        check_bounds(self, k_negative=self.k_negative, lam_negative=self.lam_negative)

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        log_w = batch.log_ratio.detach().sum(1).clamp(math.log(1e-8), MAX_LOG_RATIO)  # [N]
        w = log_w.exp()
        positive = torch.exp(self.lam_positive + self.k_positive * log_w - self.lam_positive * w)
        negative = torch.exp(self.lam_negative + self.k_negative * log_w - self.lam_negative * w)
        weight = torch.where(batch.advantages >= 0, batch.on_tokens(positive), batch.on_tokens(negative))
        values = -weight * batch.advantages * batch.logprobs
        return PolicyLoss(values, batch.on_tokens(w), torch.zeros_like(batch.mask))

    def describe(self) -> str:
        return (
            "-sg(exp(lam + k ln w - lam w)) A log pi a token, w = row ratio, (k, lam) = "
            f"({self.k_positive:g}, {self.lam_positive:g}) if A >= 0 else ({self.k_negative:g}, {self.lam_negative:g})"
        )


@dataclass
class DPPO(Surrogate):
    """Trust region on the change of a token's *probability* (total variation), as implemented in verl.

    ``-sg(min(rho, max_ratio)) A log pi v``; v = 0 where the probability has already moved too far in the direction of
    the advantage: ``p - p_old > clip_high`` for A > 0, ``p - p_old < -clip_low`` otherwise. A ratio bound punishes rare
    tokens for moves that hardly change the distribution; this one does not.

    With ``max_ratio=inf`` and ``penalty=1e-3`` it has the gradient of prime-rl's default loss, whose penalty holds also
    where the rest is cut. There π_old is the policy that sampled (correction ``behaviour`` of a sampler).

    Args:
        clip_low: how far a probability may fall.
        clip_high: how far a probability may rise.
        max_ratio: upper bound of the detached ratio.
        penalty: coefficient of ``(log pi - log pi_old)^2``.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    max_ratio: float = 3.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(self, clip_low=self.clip_low, clip_high=self.clip_high, penalty=self.penalty)
        if not self.max_ratio >= 1:
            raise ValueError(
                f"DPPO: max_ratio bounds the ratio from above and must be at least 1, got {self.max_ratio}."
            )

    def loss(self, batch: TokenBatch) -> PolicyLoss:
        ratio, advantages = batch.log_ratio.detach().exp(), batch.advantages
        change = batch.logprobs.detach().exp() - batch.old_logprobs.exp()
        cut = torch.where(advantages > 0, change > self.clip_high, change < -self.clip_low)
        values = (-ratio.clamp(max=self.max_ratio) * advantages * batch.logprobs).masked_fill(cut, 0.0)
        if self.penalty:
            values = values + self.penalty * batch.log_ratio.square()
        return PolicyLoss(values, ratio, cut)

    def describe(self) -> str:
        return (
            f"-sg(min(rho, {self.max_ratio:g})) A log pi a token, cut where p - p_old leaves "
            f"[-{self.clip_low:g}, {self.clip_high:g}] in A's direction"
            + (f"; plus {self.penalty:g} (log rho)^2" if self.penalty else "")
        )
