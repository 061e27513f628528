# SPDX-License-Identifier: Apache-2.0
"""The product of a large weight with a few rows is the same whichever factor comes first."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_rl.samplers import fast_decode
from lit_rl.samplers.fast_decode import few_rows_linear


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_for_any_number_of_rows(rows: int, bias: bool):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 12, generator=generator), torch.randn(20, 12, generator=generator)
    b = torch.randn(20, generator=generator) if bias else None
    found = few_rows_linear(x, weight, b)
    torch.testing.assert_close(found, F.linear(x, weight, b))
    assert found.is_contiguous()


def test_only_plain_large_float32_layers_are_exchanged(monkeypatch):
    monkeypatch.setattr(fast_decode, "_LARGE_WEIGHT", 16)
    large, small, half = nn.Linear(4, 4), nn.Linear(3, 3), nn.Linear(4, 4).bfloat16()
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    assert fast_decode._linear(large) is not large
    for module in (small, half, hooked):
        assert fast_decode._linear(module) is module
    with torch.autocast("cpu"):
        assert fast_decode._linear(large) is large


def test_a_model_with_large_weights_decodes_as_its_own_forward(monkeypatch):
    from lit_rl.policies import build_small_model
    from lit_rl.samplers.decoder import decoding, mismatch

    monkeypatch.setattr(fast_decode, "_LARGE_WEIGHT", 1)
    monkeypatch.setattr(fast_decode, "_FUSE_BELOW", 0)
    calls: list[int] = []
    original = few_rows_linear

    def counted(x, weight, bias=None):
        calls.append(len(x))
        return original(x, weight, bias)

    monkeypatch.setattr(fast_decode, "few_rows_linear", counted)
    torch.manual_seed(0)
    model = build_small_model(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1
    )
    with decoding(model):
        assert mismatch(fast_decode.FastDecoder(model)) is None
    assert {2, 3} <= set(calls)
