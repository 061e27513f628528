# SPDX-License-Identifier: Apache-2.0
"""Decoding for models whose state is more than keys and values: slower, with the same promises as `ModelDecoder`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.samplers.decoder import ModelDecoder


class NativeCacheDecoder(ModelDecoder):
    """Uses the cache that transformers makes for the model (linear attention, convolutions, hybrids).

    Rows are expanded and dropped by the cache's own reordering, which copies all rows that stay.
    """

    def start(self, contexts: Sequence[Tensor], owner: Tensor, limit: int) -> Tensor:
        """As in `ModelDecoder`, but all contexts are prefilled together."""
        from transformers.cache_utils import DynamicCache

        ids, mask = self._padded(contexts)
        cache: Any = DynamicCache(config=self.model.config)
        self.native = cache
        self.mask, self.position = mask, (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._native_forward(ids)
        self.native.reorder_cache(owner)
        self.mask, self.position = self.mask[owner], mask.sum(1)[owner]
        return logits[owner]

    def step(self, tokens: Tensor) -> Tensor:
        """As in `ModelDecoder`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        position, self.position = self.position, self.position[:, None]
        logits = self._native_forward(tokens[:, None])
        self.position = position + 1
        return logits

    def keep(self, alive: Tensor) -> Tensor:
        """As in `ModelDecoder`; the rows that stay keep their order."""
        order = alive.nonzero()[:, 0]
        self.native.reorder_cache(order)
        self.mask, self.position = self.mask[order], self.position[order]
        return order

    def _native_forward(self, ids: Tensor) -> Tensor:
        inputs = {"attention_mask": self.mask, "position_ids": self.position, "logits_to_keep": 1}
        known = inspect.signature(self.model.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in known}
        return self.model(input_ids=ids, past_key_values=self.native, use_cache=True, **inputs).logits[:, -1]


class RecomputeDecoder(ModelDecoder):
    """Runs the whole sequence again for every token: any causal model, in quadratic time."""

    def start(self, contexts: Sequence[Tensor], owner: Tensor, limit: int) -> Tensor:
        """As in `ModelDecoder`."""
        width = max(len(c) for c in contexts)
        ids = torch.zeros(len(contexts), width + limit, dtype=torch.long, device=self.device)
        for row, context in zip(ids, contexts):
            row[: len(context)] = context
        self.ids, self.position = ids, torch.tensor([len(c) for c in contexts], device=self.device)
        logits = self._last_logits()
        self.ids, self.position = ids[owner], self.position[owner]
        return logits[owner]

    def step(self, tokens: Tensor) -> Tensor:
        """As in `ModelDecoder`."""
        self.ids[torch.arange(len(tokens), device=self.device), self.position] = tokens
        self.position = self.position + 1
        return self._last_logits()

    def keep(self, alive: Tensor) -> Tensor:
        """As in `ModelDecoder`; the rows that stay keep their order."""
        order = alive.nonzero()[:, 0]
        self.ids, self.position = self.ids[order], self.position[order]
        return order

    def _last_logits(self) -> Tensor:
        """``[n, V]``. Padding stands on the right, where no causal model looks."""
        width = int(self.position.max())
        rows = max(1, self.prefill_tokens // width)
        parts = []
        for ids, length in zip(self.ids[:, :width].split(rows), self.position.split(rows)):
            mask = (torch.arange(width, device=self.device) < length[:, None]).long()
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            parts.append(logits[torch.arange(len(ids), device=self.device), length - 1])
        return torch.cat(parts)
