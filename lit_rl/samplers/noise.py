# SPDX-License-Identifier: Apache-2.0
"""Sampling noise as a function of (seed, draw, sample, position).

A counter-based generator: every uniform is the hash of its coordinates, so a token's noise does not depend on which
rows share its batch, on the order in which rows are decoded, or on where generation was interrupted. The hash is the
output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # torch has signed 64-bit integers only; multiplication wraps as unsigned
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_VOCABULARY = 0xD1342543DE82EF95 - (1 << 64)  # a second odd increment, so that positions and entries do not collide


def row_keys(seed: int, draw: Tensor, sample: Tensor) -> Tensor:
    """One 64-bit key for each completion.

    Args:
        seed: seed of the request.
        draw: ``[N]`` int64, `Prompts.draw` of each completion's prompt.
        sample: ``[N]`` int64, index of the completion within its group.

    Returns:
        ``[N]`` int64.
    """
    key = _mix(torch.full_like(draw, _wrap(seed)))
    key = _mix(key + (draw + 1) * _GOLDEN)
    return _mix(key + (sample + 1) * _GOLDEN)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform noise in the open interval (0, 1), float64, for keys and positions that broadcast."""
    return _unit(_mix(keys + (positions + 1) * _GOLDEN))


def gumbels(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise per vocabulary entry, ``[n]`` keys and ``[n]`` positions -> ``[n, V]`` float64.

    ``(logprobs + noise).argmax(-1)`` draws from the distribution; policies that share the noise draw coupled tokens.
    """
    entry = torch.arange(1, vocab_size + 1, device=keys.device)
    base = _mix(keys + (positions + 1) * _GOLDEN)[:, None]  # [n, 1]
    return -torch.log(-torch.log(_unit(_mix(base + entry * _VOCABULARY))))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unit(x: Tensor) -> Tensor:
    # 52 bits and a half: the largest value, 1 - 2^-53, is still below 1 in float64
    return (_shift(x, 12).double() + 0.5) * 2.0**-52


def _wrap(x: int) -> int:
    """Any Python integer as a signed 64-bit one."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
