# SPDX-License-Identifier: Apache-2.0
"""A key-value cache for batched decoding: allocated ahead, shrinks when rows finish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers ``[rows, heads, capacity, dim]`` of which a corner is in use."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]
    is_sliding = False

    def __init__(self, capacity: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.capacity, self.dtype, self.length, self.rows = capacity, dtype, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.capacity = max(self.capacity, key_states.shape[2])
        # Zeros, not empty: a masked column still enters the weighted sum, and 0 times garbage may be NaN.
        self.rows, self.is_initialized = key_states.shape[0], True
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[n, heads, q, dim]`` and return everything so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        self.length = end
        self.keys[: self.rows, :, start:end] = key_states
        self.values[: self.rows, :, start:end] = value_states
        return self.keys[: self.rows, :, :end], self.values[: self.rows, :, :end]

    def reserve(self, columns: int) -> None:
        """Make room for ``columns`` columns; grows by a half at least, so that copying stays a small share."""
        if columns <= self.capacity:
            return
        self.capacity = max(columns, self.capacity + self.capacity // 2)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(old)
            new[:, :, : self.length] = old[: self.rows, :, : self.length]
            setattr(self, name, new)

    def place(self, source: GrowingLayer, owner: Tensor, rows: Tensor, total: int) -> None:
        """Copy rows ``owner`` of ``source`` to ``rows`` here, ending at column `length`."""
        if not self.is_initialized:
            self.rows, self.is_initialized = total, True
            self.keys, self.values = self._buffer(source.keys), self._buffer(source.values)
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            mine[rows, :, self.length - source.length : self.length] = theirs[owner, :, : source.length].to(mine.dtype)

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copy rows ``source`` over rows ``target`` and keep the first ``rows`` rows."""
        for buffer in (self.keys, self.values):
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.rows = rows

    def _buffer(self, like: Tensor) -> Tensor:
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        return torch.zeros(shape, dtype=self.dtype or like.dtype, device=like.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class GrowingCache(Cache):
    """One `GrowingLayer` for each layer of the model.

    Args:
        layers: number of layers.
        capacity: columns to allocate at first.
        dtype: of the stored keys and values; None stores them as they come. Under autocast its type is right: attention
            would cast what it reads at every step.
    """

    layers: list[GrowingLayer]  # type: ignore[assignment]

    def __init__(self, layers: int, capacity: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[GrowingLayer(capacity, dtype) for _ in range(layers)])

    def place(self, source: GrowingCache, owner: Tensor, rows: Tensor, total: int, length: int) -> None:
        """Fill ``rows`` (of ``total``) with the rows ``owner`` of ``source``, right-aligned at column ``length``."""
        for mine, theirs in zip(self.layers, source.layers):
            mine.length = length
            mine.place(theirs, owner, rows, total)

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copy rows ``source`` over rows ``target`` in every layer and keep the first ``rows`` rows."""
        for layer in self.layers:
            layer.move(source, target, rows)
