# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode steps of a transformers causal language model, for a batch whose rows finish one by one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_rl.samplers.cache import GrowingCache

_FIRST_COLUMNS = 128  # columns of the cache that are allocated for new tokens before it has to grow
_WORTH_A_FORWARD = 512  # tokens of contexts that are worth a forward pass of their own, if that saves padding


class ModelDecoder:
    """Calls the model's own forward, with a mask and a cache prepared so that a step creates neither.

    Contexts are padded on the left: then all rows write the same column of the cache at a step, which is a slice and
    not a scatter, and rows differ by the number of masked columns only.

    Args:
        model: a decoder-only language model of transformers.
        prefill_tokens: padded tokens of one prefill forward.
    """

    def __init__(self, model: Any, prefill_tokens: int = 16384) -> None:
        self.model, self.prefill_tokens = model, prefill_tokens
        self.config = model.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self.windows = _windows(self.config)  # by layer type; 0 where a layer sees everything
        kinds = getattr(self.config, "layer_types", None) or list(self.windows) * self.config.num_hidden_layers
        self.layer_windows = [self.windows[kind] for kind in kinds]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def max_positions(self) -> int | None:
        """Longest sequence of a model with learned positions (GPT-2, OPT); None where nothing limits it."""
        rotary = getattr(self.config, "rope_parameters", None) is not None
        return None if rotary else getattr(self.config, "max_position_embeddings", None)

    def start(self, contexts: Sequence[Tensor], owner: Tensor, limit: int) -> Tensor:
        """Compute each context once and hand its cache to the rows that continue it.

        Args:
            contexts: one-dimensional int tensors of at least one token.
            owner: ``[n]`` index of each row's context.
            limit: how many `step` calls may follow.

        Returns:
            ``[n, V]`` logits of each row's next token.
        """
        lengths = torch.tensor([len(c) for c in contexts], device=self.device)
        self.column = int(lengths.max())
        self.position = lengths[owner]  # [n]
        dtype = autocast_dtype(self.device)
        self.cache = GrowingCache(self.config.num_hidden_layers, self.column + min(limit, _FIRST_COLUMNS), dtype)
        logits = torch.empty(0)
        for chunk in self._chunks([len(c) for c in contexts]):
            part, cache = self._prefill([contexts[i] for i in chunk])
            place = torch.full((len(contexts),), -1, device=self.device)
            place[chunk] = torch.arange(len(chunk), device=self.device)
            rows = (place[owner] >= 0).nonzero()[:, 0]
            mine = place[owner[rows]]
            self.cache.place(cache, mine, rows, len(owner), self.column)
            if not len(logits):
                logits = part.new_empty(len(owner), part.shape[-1])
            logits[rows] = part[mine]
        padding = self.column - self.position  # [n]
        columns = torch.arange(self.column + limit, device=self.device)
        self.mask = _additive(columns >= padding[:, None], self._mask_dtype)[:, None, None]  # [n, 1, 1, columns]
        self.padded = bool((padding > 0).any())
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, ``[n]`` -> ``[n, V]`` logits of the next."""
        logits = self._forward(tokens)
        self.column += 1
        self.position = self.position + 1
        return logits

    def keep(self, alive: Tensor) -> Tensor:
        """Drop rows with ``alive[n]`` false. Returns the new order, as indices of the old.

        `batch_rows` of them stay, all that are alive included. Rows from the end move into the holes, so that no more
        is copied than was dropped.
        """
        count = min(self.batch_rows(int(alive.sum())), len(alive))
        order = torch.arange(count, device=alive.device)
        tail = alive[count:].nonzero()[:, 0] + count
        holes = (~alive[:count]).nonzero()[: len(tail), 0]
        order[holes] = tail
        self.cache.move(tail, holes, count)
        self.position, self.mask = self.position[order], self.mask[order]
        return order

    def batch_rows(self, alive: int) -> int:
        """How many rows the batch has once only ``alive`` of them are left.

        On CPUs low-precision products are compiled for each shape at its first use, so there the number is rounded up.
        """
        dtype = autocast_dtype(self.device) or self._mask_dtype
        rounded = self.device.type == "cpu" and dtype != torch.float32
        return -(-alive // 8) * 8 if rounded else alive

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._step_mask(),
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _step_mask(self) -> Tensor | dict[str, Tensor]:
        """The additive mask of one decode step, per layer type where the model has several."""
        total = self.column + 1
        full = self.mask[..., :total]
        masks = {name: full if not window else self._windowed(full, window) for name, window in self.windows.items()}
        return masks if hasattr(self.config, "layer_types") else next(iter(masks.values()))

    def _windowed(self, full: Tensor, window: int) -> Tensor:
        """Mask all but the last ``window`` columns."""
        if full.shape[-1] <= window:
            return full
        masked = full.clone()
        masked[..., : full.shape[-1] - window] = torch.finfo(full.dtype).min
        return masked

    @property
    def _mask_dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _chunks(self, lengths: list[int]) -> Iterator[list[int]]:
        """Contexts of similar lengths, computed together: `prefill_tokens` at most with padding, or one context."""
        chunk: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            widest = lengths[chunk[0]] if chunk else 0
            full = (len(chunk) + 1) * widest > self.prefill_tokens
            if chunk and (full or (len(chunk) * widest >= _WORTH_A_FORWARD and 4 * lengths[i] < 3 * widest)):
                yield chunk
                chunk = []
            chunk.append(i)
        yield chunk

    def _prefill(self, contexts: Sequence[Tensor]) -> tuple[Tensor, GrowingCache]:
        """``[b, V]`` logits after each context, and the cache of all of them."""
        ids, mask = self._padded(contexts)
        cache = GrowingCache(self.config.num_hidden_layers)
        out = self.model(
            input_ids=ids,
            attention_mask=mask if bool((mask == 0).any()) else None,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], cache

    def _padded(self, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids padded on the left, and the mask of real tokens, both int ``[b, width]``."""
        width = max(len(c) for c in contexts)
        ids = torch.zeros(len(contexts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, context in enumerate(contexts):
            ids[i, width - len(context) :] = context
            mask[i, width - len(context) :] = 1
        return ids.to(self.device), mask.to(self.device)


def unsupported(model: Any) -> str | None:
    """Why `ModelDecoder` cannot decode with this model, or None. Does not run it."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state instead of keys and values"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    missing = {"position_ids", "past_key_values", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
    if missing:
        return f"its forward takes no {', '.join(sorted(missing))}"
    return None


def mismatch(decoder: ModelDecoder) -> str | None:
    """Compare a few padded, cached, shrinking decode steps with plain forwards; None if they agree."""
    size = decoder.vocab_size
    texts = [[(7 * i + 3) % size for i in range(5)], [(5 * i + 1) % size for i in range(2)]]
    rows = [list(texts[0]), list(texts[0]), list(texts[1])]
    owner = torch.tensor([0, 0, 1], device=decoder.device)
    logits = decoder.start([torch.tensor(t) for t in texts], owner, 3)
    decoder.vocab_size = logits.shape[-1]  # a head may be larger than its config says
    quantised = any(not p.is_floating_point() for p in decoder.model.parameters())  # such layers round their inputs
    exact = logits.dtype == torch.float32 and decoder._mask_dtype == torch.float32 and not quantised
    for step in range(3):
        worst = max(_difference(decoder, row, found) for row, found in zip(rows, logits))
        if not worst <= (1e-3 if exact else 0.1):
            return f"its cached decode steps differ from a plain forward (relative error {worst:.1e} at step {step})"
        if step == 1:  # the first row has finished
            order = decoder.keep(torch.arange(len(rows), device=decoder.device) > 0)
            rows = [rows[i] for i in order.tolist()]
        if step < 2:
            tokens = [(11 * step + 13 * i + 2) % size for i in range(len(rows))]
            rows = [[*row, token] for row, token in zip(rows, tokens)]
            logits = decoder.step(torch.tensor(tokens, device=decoder.device))
    return None


def _difference(decoder: ModelDecoder, row: list[int], found: Tensor) -> float:
    plain = decoder.model(input_ids=torch.tensor([row], device=decoder.device)).logits[0, -1].float()
    scale = (plain - plain.mean()).abs().max().clamp(min=1e-6)
    return float((plain - found.float()).abs().max() / scale)


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """No gradients, evaluation mode and an attention kernel that takes masks; all restored afterwards."""
    training = [m for m in model.modules() if m.training]
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    switch = attention not in ("sdpa", "eager")
    # Autocast keeps low-precision copies of the weights until its outermost context ends: an optimizer step inside that
    # context has made them stale.
    torch.clear_autocast_cache()
    try:
        for module in training:
            module.training = False
        if switch:
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if switch:
            model.set_attn_implementation(attention)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device; None outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _windows(config: Any) -> dict[str, int]:
    """Attention window by layer type; 0 where the layer sees everything."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: window if kind == "sliding_attention" else 0 for kind in dict.fromkeys(kinds)}
    return {"full_attention": window if getattr(config, "use_sliding_window", True) else 0}


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
