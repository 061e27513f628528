# SPDX-License-Identifier: Apache-2.0
"""The key-value cache: allocated ahead, filled in the middle of a batch, shrunk."""

import torch
from torch import Tensor

from lit_rl.samplers.cache import GrowingCache, GrowingLayer


def states(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, columns, 3, generator=torch.Generator().manual_seed(seed))


def test_what_was_appended_is_read_back_in_order() -> None:
    layer, parts = GrowingLayer(capacity=4), [states(3, n, seed=n) for n in (2, 1, 1, 5, 1)]
    for i, part in enumerate(parts):
        keys, values = layer.update(part, -part)
        assert torch.equal(keys, torch.cat(parts[: i + 1], 2))
        assert torch.equal(values, -keys)
        assert layer.get_seq_length() == keys.shape[2]
    assert layer.get_mask_sizes(1) == (11, 0)


def test_memory_is_allocated_ahead_and_rarely() -> None:
    layer, addresses = GrowingLayer(capacity=8), set()
    for step in range(200):
        layer.update(states(2, 1, step), states(2, 1, step))
        addresses.add(layer.keys.data_ptr())
    assert len(addresses) <= 10
    assert layer.capacity < 2 * 200


def test_what_is_returned_is_a_view() -> None:
    layer = GrowingLayer(capacity=8)
    keys, _ = layer.update(states(2, 3), states(2, 3))
    assert keys.data_ptr() == layer.keys.data_ptr()


def test_unused_columns_are_zero_so_that_masked_attention_stays_finite() -> None:
    layer = GrowingLayer(capacity=6)
    layer.update(states(2, 2), states(2, 2))
    layer.reserve(20)
    assert layer.keys[:, :, 2:].abs().max() == layer.values[:, :, 2:].abs().max() == 0


def test_prefills_are_placed_in_their_rows_ending_at_the_same_column() -> None:
    """Two prefills of different width, handed to five rows in mixed order."""
    wide, narrow = GrowingCache(2), GrowingCache(2)
    for layer in range(2):
        wide.update(states(2, 4, seed=layer), states(2, 4, seed=10 + layer), layer)
        narrow.update(states(1, 2, seed=20 + layer), states(1, 2, seed=30 + layer), layer)
    cache = GrowingCache(2, capacity=10)
    cache.place(wide, torch.tensor([1, 0, 1]), torch.tensor([0, 2, 4]), total=5, length=4)
    cache.place(narrow, torch.tensor([0, 0]), torch.tensor([1, 3]), total=5, length=4)
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape == (5, 2, 10, 3)
        assert torch.equal(layer.keys[[0, 2, 4], :, :4], states(2, 4, seed=i)[[1, 0, 1]])
        assert torch.equal(layer.values[[0, 2, 4], :, :4], states(2, 4, seed=10 + i)[[1, 0, 1]])
        assert torch.equal(layer.keys[[1, 3], :, 2:4], states(1, 2, seed=20 + i)[[0, 0]])
        assert layer.keys[[1, 3], :, :2].abs().max() == 0
    keys, _ = cache.update(states(5, 1, seed=99), states(5, 1, seed=99), 0)
    assert torch.equal(keys[:, :, 4:], states(5, 1, seed=99))


def test_rows_move_into_holes_and_the_rest_is_forgotten() -> None:
    cache = GrowingCache(1, capacity=8)
    before = states(6, 3)
    cache.update(before, -before, 0)
    cache.move(torch.tensor([4, 5]), torch.tensor([0, 2]), rows=4)
    new = states(4, 1, seed=1)
    keys, values = cache.update(new, -new, 0)
    expected = torch.cat([before[[4, 1, 5, 3]], new], 2)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)
    cache.layers[0].reserve(100)  # growing copies the rows in use only
    assert cache.layers[0].keys.shape[0] == 4


def test_a_type_can_be_given() -> None:
    layer = GrowingLayer(capacity=4, dtype=torch.bfloat16)
    keys, values = layer.update(states(2, 2), states(2, 2))
    assert keys.dtype == values.dtype == torch.bfloat16
    source = GrowingCache(1)
    source.update(states(1, 2), states(1, 2), 0)
    cache = GrowingCache(1, capacity=4, dtype=torch.bfloat16)
    cache.place(source, torch.tensor([0]), torch.tensor([0]), total=1, length=2)
    assert cache.layers[0].keys.dtype == torch.bfloat16
