# SPDX-License-Identifier: Apache-2.0
"""From logits to the distribution that is sampled from, and tokens drawn from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_rl.samplers.base import Sampling


def processed_logprobs(logits: Tensor, sampling: Sampling, usable: int | None = None) -> Tensor:
    """Log-probabilities after temperature and over the support, ``[n, V]`` -> ``[n, V]`` float32.

    The restrictions apply in the order top-k, top-p, min-p, each to the renormalised outcome of the one before; tokens
    outside are ``-inf``. Ties with the k-th token stay inside. With temperature 0 the result is the unrestricted
    distribution of temperature 1.

    Args:
        logits: of the whole head.
        sampling: temperature and restrictions.
        usable: ids from here on are no tokens, and belong to no restricted support. Without a restriction they keep
            their share of the probability, as in the trainer's log-probabilities.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if usable is not None and usable < logits.shape[-1] and not sampling.full_support:
        outside = torch.arange(logits.shape[-1], device=logits.device) >= usable
        logits = logits.masked_fill(outside, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, sampling.top_p), -math.inf)
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits.log_softmax(-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Bool ``[n, V]``: the smallest set of most likely tokens whose probability reaches ``top_p``."""
    ordered, index = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # probability of all more likely tokens
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before < top_p)


def draw_tokens(probs: Tensor, uniform: Tensor, usable: int) -> Tensor:
    """Inverse-CDF sampling: ``[n, V]`` probabilities and ``[n]`` uniforms in (0, 1) -> ``[n]`` token ids.

    Args:
        probs: need not be normalised; entries of probability 0 are never drawn.
        uniform: float64 noise.
        usable: only ids below this are drawn (heads are often padded beyond the tokenizer's vocabulary).
    """
    cdf = probs[:, :usable].cumsum(-1, dtype=torch.float64)
    target = (uniform * cdf[:, -1])[:, None]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=usable - 1)
