# SPDX-License-Identifier: Apache-2.0
"""Rounding to 4 and 8 bits: the codes, the scales, and agreement with bitsandbytes where it is installed."""

import pytest
import torch

from lit_rl.policies.rounding import FP4, NF4, rounded

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize(("format", "codes"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bits_against_a_loop(format, codes):
    flat, found = WEIGHT.flatten(), rounded(WEIGHT, format).flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64].tolist()
        scale = max(abs(w) for w in block)
        for w, got in zip(block, found[start : start + 64].tolist()):
            nearest = min(codes, key=lambda c, w=w: abs(c - w / scale))
            assert got == pytest.approx(nearest * scale, abs=1e-7)


def test_eight_bits_against_a_loop():
    found = rounded(WEIGHT, "int8")
    for row, got in zip(WEIGHT.tolist(), found.tolist()):
        step = max(abs(w) for w in row) / 127
        assert got == pytest.approx([round(w / step) * step for w in row], abs=1e-7)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_rounding_twice_is_rounding_once_and_zeros_stay(format):
    once = rounded(WEIGHT, format)
    torch.testing.assert_close(rounded(once, format), once, atol=1e-7, rtol=1e-6)
    assert not rounded(torch.zeros(3, 7), format).any()
    assert rounded(WEIGHT.bfloat16(), format).dtype == torch.bfloat16


def test_more_bits_are_closer():
    error = {f: float((rounded(WEIGHT, f) - WEIGHT).square().mean()) for f in ("nf4", "fp4", "int8")}
    assert error["int8"] < error["nf4"] < error["fp4"]


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="nf4, fp4, int8"):
        rounded(WEIGHT, "int2")


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(format):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(WEIGHT, quant_type=format, blocksize=64)
    theirs = functional.dequantize_4bit(packed, state)
    ours = rounded(WEIGHT, format)
    # Where a weight lies between two codes, kernels may differ in which is nearer by a last bit.
    assert ((theirs - ours).abs() > 1e-4).float().mean() < 0.01
