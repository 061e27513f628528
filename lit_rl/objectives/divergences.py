# SPDX-License-Identifier: Apache-2.0
"""Divergences between policies: sampled-token estimators, the KL penalty, and exact ones over the vocabulary.

With one sampled token a position, the value of an estimator and the gradient that one gets by differentiating it are
two different things. `KLPenalty` therefore keeps them apart: ``report`` is the number to log, ``values`` is what is
differentiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0  # e^20 is still far inside float32
_MAX_K3 = 10.0  # bounds the pull of a single token, as in verl


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Estimate of KL(policy || other) from the log-probabilities of tokens that the policy sampled.

    With ``u = other - policy``: k1 = -u (unbiased, high variance), k2 = u²/2 (biased, never negative),
    k3 = e^u - 1 - u (unbiased, never negative). ``u`` is clamped to ±20 and k3 to 10.

    Args:
        logprobs: log-probabilities under the policy, any shape.
        other_logprobs: log-probabilities under the other policy, the same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        One estimate an entry, in nats.

    Raises:
        ValueError: unknown estimator.
    """
    u = (other_logprobs - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        return -u
    if estimator == "k2":
        return u.square() / 2
    if estimator == "k3":
        return (torch.expm1(u) - u).clamp(max=_MAX_K3)
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}.")


@dataclass
class KLPenalty:
    """Sampled-token penalty on KL(policy || reference).

    What the gradient of each surrogate is in expectation, on tokens sampled from the current policy:

    | surrogate | E[gradient] | remark |
    | --- | --- | --- |
    | k1 | 0 | useless as a loss; use k1 in the reward instead |
    | k2 | KL(policy \\|\\| reference), reverse KL | what one usually wants |
    | k3 | KL(reference \\|\\| policy), forward KL | GRPO's original term (arXiv 2402.03300, eq. 4) |
    | k3+ | reverse KL | value of k3, gradient of k2 |

    With ``importance_weighted`` every surrogate gives the reverse-KL gradient, also for tokens sampled from an older
    policy: the ratio ``policy / old`` multiplies the term, attached to the graph for k1 and k3 (whose *value* is
    unbiased, so that the ratio carries the gradient through the sampling distribution) and detached for k2 and k3+
    (whose *gradient* is right already).

    Args:
        estimator: the estimator that is reported.
        surrogate: the estimator that is differentiated.
        importance_weighted: correct for tokens that an older policy sampled; needs ``old_logprobs``.
    """

    estimator: Estimator = "k3"
    surrogate: Literal["k1", "k2", "k3", "k3+"] = "k2"
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {self.estimator!r}.")
        if self.surrogate not in ("k1", "k2", "k3", "k3+"):
            raise ValueError(f"surrogate must be 'k1', 'k2', 'k3' or 'k3+', got {self.surrogate!r}.")
        if self.surrogate == "k1" and not self.importance_weighted:
            raise ValueError(
                "surrogate='k1' has zero expected gradient: choose 'k2' (reverse KL) or 'k3' (forward KL), or set "
                "importance_weighted=True."
            )

    def values(self, logprobs: Tensor, reference: Tensor, old_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """The token losses to differentiate.

        Args:
            logprobs: ``[N, T]`` under the current policy, with gradient.
            reference: ``[N, T]`` under the reference policy.
            old_logprobs: ``[N, T]`` under the policy that sampled; may be None unless ``importance_weighted``.
            mask: ``[N, T]``; entries outside may hold anything, are 0 and give no gradient.

        Returns:
            ``[N, T]``.
        """
        valid = mask.bool()
        current, other = logprobs.masked_fill(~valid, 0.0), reference.detach().masked_fill(~valid, 0.0)
        if self.surrogate == "k3+":
            gradient = kl_estimate(current, other, "k2")
            penalty = kl_estimate(current, other, "k3").detach() + gradient - gradient.detach()
        else:
            penalty = kl_estimate(current, other, self.surrogate)
        if self.importance_weighted:
            if old_logprobs is None:
                raise ValueError("importance_weighted=True needs old_logprobs: the policy that sampled the tokens.")
            log_ratio = current - old_logprobs.detach().masked_fill(~valid, 0.0)
            ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
            penalty = penalty * (ratio if self.surrogate in ("k1", "k3") else ratio.detach())
        return penalty.masked_fill(~valid, 0.0)

    @torch.no_grad()
    def report(self, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """The estimate to log, ``[N, T]`` in nats, without gradient; 0 outside the mask."""
        valid = mask.bool()
        estimate = kl_estimate(
            logprobs.masked_fill(~valid, 0.0), reference.masked_fill(~valid, 0.0), estimator=self.estimator
        )
        return estimate.masked_fill(~valid, 0.0)

    def describe(self) -> str:
        """The term in one line, for the header of a run."""
        reverse = self.importance_weighted or self.surrogate in ("k2", "k3+")
        direction = "KL(policy || reference)" if reverse else "KL(reference || policy)"
        weighted = ", importance-weighted" if self.importance_weighted else ""
        return f"KL penalty: gradient of {self.surrogate}{weighted} ({direction}), reported as {self.estimator}"


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) over the vocabulary. Gradient in the student's logits: p - q.

    Args:
        student_logits: ``[..., V]`` (p).
        teacher_logits: ``[..., V]`` (q).

    Returns:
        ``[...]`` in nats. A token with logit -inf under the teacher adds nothing.
    """
    return _kl(_log_softmax(teacher_logits), _log_softmax(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher) over the vocabulary. Gradient in the student's logits: p (log(p/q) - KL).

    Args:
        student_logits: ``[..., V]`` (p).
        teacher_logits: ``[..., V]`` (q).

    Returns:
        ``[...]`` in nats. A token with logit -inf under the student adds nothing.
    """
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits))


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence over the vocabulary (GKD, arXiv 2306.13649).

    ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``. By the convention of that paper,
    beta = 0 is the forward and beta = 1 the reverse KL (the limits of the formula itself are 0).

    Args:
        student_logits: ``[..., V]`` (p).
        teacher_logits: ``[..., V]`` (q).
        beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        ``[...]`` in nats.

    Raises:
        ValueError: ``beta`` outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is the weight of the teacher in a mixture and must lie in [0, 1], got {beta}.")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    student, teacher = _log_softmax(student_logits), _log_softmax(teacher_logits)
    # Clamped log-probabilities, since the mixture of two impossible tokens has no gradient.
    lowest = math.log(torch.finfo(student.dtype).tiny)
    mixture = torch.logaddexp(teacher.clamp(min=lowest) + math.log(beta), student.clamp(min=lowest) + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return wide.log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q), where a token with p = 0 adds nothing (0 log 0 = 0)."""
    probability = log_p.exp()
    return (probability * (log_p - log_q).masked_fill(probability == 0, 0.0)).sum(-1)
