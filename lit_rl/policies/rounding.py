# SPDX-License-Identifier: Apache-2.0
"""What quantisation does to weights, without the kernels: the values that 4- and 8-bit formats can hold.

NF4 is from QLoRA (arXiv 2305.14314), FP4 is bitsandbytes' format of a sign, two exponent bits and a mantissa bit; both
scale blocks of 64 weights by their largest magnitude. Int8 scales each row of a matrix (LLM.int8, arXiv 2208.07339).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Format = Literal["nf4", "fp4", "int8"]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.005208333333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
FP4 = (*(-m for m in reversed(_FP4_MAGNITUDES)), 0.0, *_FP4_MAGNITUDES)


def rounded(weight: Tensor, format: Format = "nf4", block: int = 64) -> Tensor:
    """The weights that are left after quantising and dequantising ``weight``; same shape and type.

    Args:
        weight: ``[rows, columns]``.
        format: see the module.
        block: weights that share a scale (4-bit formats).

    Raises:
        ValueError: unknown format.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}.")
    wide = weight.detach().float()
    if format == "int8":
        scale = wide.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale > 0, (wide / scale).round() * scale, 0.0).to(weight.dtype)
    codes = torch.tensor(NF4 if format == "nf4" else FP4, device=weight.device)
    flat = torch.nn.functional.pad(wide.flatten(), (0, -weight.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(torch.where(scale > 0, flat / scale, 0.0), (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)
