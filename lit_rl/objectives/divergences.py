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
_SMALLEST_REST = 1e-7  # what 1 minus a sum of float32 probabilities can tell from 0


def kl_estimate(
    logprobs: Tensor, other_logprobs: Tensor, estimator: Estimator = "k3", cap: float | None = _MAX_K3
) -> Tensor:
    """Estimate of KL(policy || other) from the log-probabilities of tokens that the policy sampled.

    With ``u = other - policy``: k1 = -u (unbiased, high variance), k2 = u²/2 (biased, never negative),
    k3 = e^u - 1 - u (unbiased, never negative). ``u`` is clamped to ±20 and k3 to ``cap``.

    Args:
        logprobs: log-probabilities under the policy, any shape.
        other_logprobs: log-probabilities under the other policy, the same shape.
        estimator: "k1", "k2" or "k3".
        cap: largest value of k3, where the gradient ends; None for no bound.

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
        k3 = torch.expm1(u) - u
        return k3 if cap is None else k3.clamp(max=cap)
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
        cap: largest value of k3 of one token (verl: 10), where its gradient ends; None for no bound.
    """

    estimator: Estimator = "k3"
    surrogate: Literal["k1", "k2", "k3", "k3+"] = "k2"
    importance_weighted: bool = False
    cap: float | None = _MAX_K3

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
            penalty = kl_estimate(current, other, "k3", self.cap).detach() + gradient - gradient.detach()
        else:
            penalty = kl_estimate(current, other, self.surrogate, self.cap)
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
        own, other = logprobs.masked_fill(~valid, 0.0), reference.masked_fill(~valid, 0.0)
        estimate = kl_estimate(own, other, self.estimator, self.cap)
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


Tail = Literal["bucket", "renormalize", "drop"]


@dataclass
class Divergence:
    r"""How far the student's distribution p is from the teacher's q: ``D = sum_v f(p_v, q_v)`` over the vocabulary.

    | beta | f | D |
    | --- | --- | --- |
    | 0 | q (log q - log p) | forward KL(q \|\| p): cover all that the teacher does |
    | 1 | p (log p - log q) | reverse KL(p \|\| q): keep to what the teacher likes |
    | between | beta q (log q - log m) + (1 - beta) p (log p - log m) | JSD, m = beta q + (1 - beta) p |

    The family is that of GKD (arXiv 2306.13649). ``entry_clip`` bounds each summand f from above, as in On-Policy
    Self-Distillation (arXiv 2601.18734, v3). The sum is then no divergence any more: it can be negative, and where the
    largest summands are clipped its gradient can point *away* from the teacher. ``token_clip`` bounds the sum D
    instead, and a token beyond it has no gradient.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1].
        entry_clip: largest value of one summand; None for no bound.
        token_clip: largest value of D at one position; None for no bound.
        top_k: look at the teacher's k most likely words only; None takes the whole vocabulary.
        tail: what becomes of the other words with ``top_k``: ``"bucket"`` makes them one more outcome with all that is
            left of both distributions, ``"renormalize"`` scales both to the k words (OPSD), ``"drop"`` leaves their
            summands out and keeps the sum from falling below 0 (verl).
    """

    beta: float = 0.5
    entry_clip: float | None = None
    token_clip: float | None = None
    top_k: int | None = None
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is the weight of the teacher in a mixture and must lie in [0, 1], got {self.beta}.")
        for name in ("entry_clip", "token_clip"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be positive, or None for no bound, got {bound}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for the whole vocabulary, got {self.top_k}.")
        if self.tail not in ("bucket", "renormalize", "drop"):
            raise ValueError(f"tail must be 'bucket', 'renormalize' or 'drop', got {self.tail!r}.")

    def entries(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The summands f before any clipping, any shape."""
        if self.beta == 0:
            return log_q.exp() * (log_q - log_p)
        if self.beta == 1:
            return log_p.exp() * (log_p - log_q)
        log_m = self._mixture(log_p, log_q)
        return self.beta * log_q.exp() * (log_q - log_m) + (1 - self.beta) * log_p.exp() * (log_p - log_m)

    def slopes(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Derivative of each unclipped summand in its own log p.

        With ``a`` these slopes, the gradient of D in the student's logits is ``a_v - p_v sum_u a_u``.
        """
        if self.beta == 0:
            return -log_q.exp()
        if self.beta == 1:
            return log_p.exp() * (log_p - log_q + 1)
        return (1 - self.beta) * log_p.exp() * (log_p - self._mixture(log_p, log_q))

    def _mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.logaddexp(log_q + math.log(self.beta), log_p + math.log1p(-self.beta))

    def total(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D from the log-probabilities of all outcomes, ``[..., V] -> [...]``, differentiable in ``log_p``."""
        values = self.entries(log_p, log_q)
        if self.entry_clip is not None:
            values = values.clamp(max=self.entry_clip)
        return self.bounded(values.sum(-1))

    def total_of_top(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D from the log-probabilities of the teacher's k most likely words, ``[..., k] -> [...]``."""
        if self.tail == "renormalize":
            return self.total(log_p.log_softmax(-1), log_q.log_softmax(-1))
        if self.tail == "bucket":
            return self.total(_with_rest(log_p), _with_rest(log_q))
        return self.total(log_p, log_q).clamp(min=0.0)

    def bounded(self, totals: Tensor) -> Tensor:
        """D within ``token_clip``."""
        return totals if self.token_clip is None else totals.clamp(max=self.token_clip)

    def beyond(self, totals: Tensor) -> Tensor:
        """Where D has left ``token_clip``, so that the token has no gradient."""
        return totals > (math.inf if self.token_clip is None else self.token_clip)

    def of_logits(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """D from full logits, ``[..., V] -> [...]``: the plain form, for small vocabularies and as a reference.

        `lit_rl.policies.divergence` computes the same from hidden states without ever holding the logits.
        """
        log_p, log_q = _log_softmax(student_logits), _log_softmax(teacher_logits.detach())
        lowest = math.log(torch.finfo(log_p.dtype).tiny)  # excluded words (logit -inf): 0 * log 0 is 0
        log_p, log_q = log_p.clamp(min=lowest), log_q.clamp(min=lowest)
        if self.top_k is None or self.top_k >= log_q.shape[-1]:
            return self.total(log_p, log_q)
        log_q, top = log_q.topk(self.top_k, dim=-1)
        return self.total_of_top(log_p.gather(-1, top), log_q)

    def describe(self) -> str:
        """The formula in one line, for the header of a run."""
        name = {0.0: "KL(teacher || policy)", 1.0: "KL(policy || teacher)"}.get(
            float(self.beta), f"JSD with weight {self.beta:g} of the teacher"
        )
        notes = [] if self.entry_clip is None else [f"each summand at most {self.entry_clip:g}"]
        notes += [] if self.token_clip is None else [f"each token at most {self.token_clip:g}"]
        tails = {"bucket": "the rest as one outcome", "renormalize": "renormalised", "drop": "the rest left out"}
        notes += [] if self.top_k is None else [f"over the teacher's top {self.top_k}, {tails[self.tail]}"]
        return ", ".join([name, *notes])


def _with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities ``[..., k]`` and of everything else, ``[..., k + 1]``."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    return torch.cat([log_p, rest.clamp(min=_SMALLEST_REST).log()], -1)
