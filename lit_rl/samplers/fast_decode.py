# SPDX-License-Identifier: Apache-2.0
"""A decode step for Llama-like layers, written out: the arithmetic of the model's forward in fewer operations.

At small sizes a step takes as long as it has operations, whatever they compute. Prefill, masks and the cache stay those
of `ModelDecoder`; whether the step agrees with the model is checked when the sampler is set up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rl.samplers.cache import GrowingLayer
from lit_rl.samplers.decoder import ModelDecoder, autocast_dtype

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_FUSE_BELOW = 64_000_000  # parameters; a larger model gains little from fused weights and would pay memory for the copy
_WORTH_A_BLOCK = 2048  # columns of padding, over rows, that are worth two more products a layer
_FEW_ROWS, _LARGE_WEIGHT = 8, 2**18  # where `few_rows_linear` turns the product round


def has_fast_step(model: Any) -> bool:
    """Whether every layer of the model is of a kind that `FastDecoder` knows."""
    layers = getattr(model.base_model, "layers", ())
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    length_dependent = rope in ("dynamic", "longrope")  # their frequencies depend on the longest row of the batch
    return bool(len(layers)) and all(type(x).__name__ in _LAYERS for x in layers) and not length_dependent


class FastDecoder(ModelDecoder):
    """`ModelDecoder` whose step runs the parts of the layers itself.

    Plain linear layers are fused (queries, keys and values; gate and up) into one matrix, anew for each request because
    the trainer changes them. Any other module in their place (LoRA, quantised, hooked) is called as it is. If a whole
    layer is hooked, the request is decoded by the model's forward.
    """

    def start(self, contexts: Sequence[Tensor], owner: Tensor, limit: int) -> Tensor:
        """As in `ModelDecoder`; also takes the weights for this request."""
        logits = super().start(contexts, owner, limit)
        core = self.model.base_model
        parts = [self.model, core, *(m for x in core.layers for m in (x, x.self_attn, x.mlp))]
        self.layers: list[_Layer] | None = None
        if any(_hooked(m) for m in parts):
            return logits
        fuse = sum(p.numel() for p in core.parameters()) < _FUSE_BELOW
        self.layers = [_Layer(x, fuse) for x in core.layers]
        self.blocks = self._blocks()
        self.norm, self.head = _norm(core.norm), _linear(self.model.get_output_embeddings())
        positions = torch.arange(self.column + limit, device=self.device)[None]
        cos, sin = core.rotary_emb(core.embed_tokens.weight[:1], positions)
        half = sin.shape[-1] // 2
        # rotate_half(x) * sin equals roll(x, half) * signed sin
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # [columns, dim]
        return logits

    def keep(self, alive: Tensor) -> Tensor:
        order = super().keep(alive)
        if self.layers is not None:
            self.blocks = self._blocks()
        return order

    def _blocks(self) -> list[_Block]:
        """Neighbouring rows that attend together, and the columns before all of their contexts, which they leave out.

        Rows that continue long completions stand beside rows that begin, and the batch is as wide as its longest.
        """
        whole = [_Block(slice(None), 0)]
        if not self.padded or any(self.layer_windows) or self.device.type != "cpu":
            return whole
        padding = (self.column - self.position).tolist()

        def split(first: int, last: int) -> list[_Block]:
            left_out = min(padding[first:last])
            middle = (first + last) // 2
            if middle > first:
                halves = (first, middle), (middle, last)
                saved = sum((b - a) * (min(padding[a:b]) - left_out) for a, b in halves)
                if saved >= _WORTH_A_BLOCK:
                    return [*split(*halves[0]), *split(*halves[1])]
            return [_Block(slice(first, last), left_out)]

        return split(0, len(padding)) if padding else whole

    def _forward(self, tokens: Tensor) -> Tensor:
        if self.layers is None:
            return super()._forward(tokens)
        hidden = self.model.get_input_embeddings()(tokens)  # [n, hidden]
        cos, sin = self.cos[self.position, None], self.sin[self.position, None]  # [n, 1, dim]
        mask = self.mask[..., : self.column + 1] if self.padded else None
        for layer, cache, window in zip(self.layers, self.cache.layers, self.layer_windows):
            hidden = layer(hidden, cos, sin, cache, mask, window, self.blocks)
        return self.head(self.norm(hidden))


class _Block(NamedTuple):
    """Rows of a batch, and how many columns of the cache are padding for all of them."""

    rows: slice
    padding: int


class _Layer:
    """One decoder layer for one new token a row."""

    def __init__(self, layer: Any, fuse: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.dim, self.groups, self.scale = attention.head_dim, attention.num_key_value_groups, attention.scaling
        self.kv_heads = attention.config.num_key_value_heads
        self.heads = self.kv_heads * self.groups
        self.norm_1, self.norm_2 = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.q_norm = _norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = _norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.qkv = _projection([attention.q_proj, attention.k_proj, attention.v_proj], fuse)
        self.out = _residual(attention.o_proj)
        self.gate_up = _projection([mlp.gate_proj, mlp.up_proj], fuse)
        self.act = mlp.act_fn
        self.down = _residual(mlp.down_proj)

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: GrowingLayer,
        mask: Tensor | None,
        window: int,
        blocks: list[_Block],
    ) -> Tensor:
        n, h, k = len(hidden), self.heads, self.kv_heads
        qkv = self.qkv(self.norm_1(hidden)).view(n, h + 2 * k, self.dim)
        qk = qkv[:, : h + k]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :h]), self.k_norm(qk[:, h:])], 1)
        qk = torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin)
        keys, values = cache.update(qk[:, h:, None], qkv[:, h + k :, None])
        if window:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
            mask = mask[..., -window:] if mask is not None else None
        queries = qk[:, :h].reshape(n, k, self.groups, self.dim)
        queries, values = queries.to(keys.dtype), values.to(keys.dtype)
        parts = []
        for rows, padding in blocks:
            masked = mask[rows, ..., padding:] if mask is not None else None
            attended = _attend(queries[rows], keys[rows, :, padding:], values[rows, :, padding:], masked, self.scale)
            parts.append(attended)
        mixed = torch.cat(parts) if len(parts) > 1 else parts[0]
        hidden = self.out(hidden, mixed.reshape(n, h * self.dim))
        gate, up = self.gate_up(self.norm_2(hidden)).chunk(2, -1)
        return self.down(hidden, self.act(gate) * up)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one token a row; the query heads that share a key head stand in the place of query positions.

    Args:
        queries: ``[n, heads, group, dim]``.
        keys: ``[n, heads, T, dim]``, as are the values.
        mask: additive ``[n, 1, 1, T]``.
        scale: factor of the scores.
    """
    if keys.device.type != "cpu" or keys.dtype != torch.float32:
        mask = mask.to(keys.dtype).expand(-1, -1, queries.shape[2], -1) if mask is not None else None
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    # Batched products beat the fused kernel on CPUs, which blocks for many query positions.
    scores = torch.matmul(queries * scale, keys.mT)
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1), values)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _hooked(module)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    if _hooked(module) or not hasattr(module, "variance_epsilon"):
        return module
    return partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon)


def _projection(modules: list[Any], fuse: bool) -> Callable[[Tensor], Tensor]:
    """The outputs of several linear modules side by side."""
    if not fuse or not all(_plain(m) for m in modules):
        parts = [_linear(m) for m in modules]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    weight = torch.cat([m.weight for m in modules])
    bias = None
    if any(m.bias is not None for m in modules):
        bias = torch.cat([m.bias if m.bias is not None else m.weight.new_zeros(len(m.weight)) for m in modules])
    dtype = autocast_dtype(weight.device)
    if dtype is not None:  # cast once, not at every step
        weight, bias = weight.to(dtype), bias.to(dtype) if bias is not None else None
    return partial(F.linear, weight=weight, bias=bias)


def _residual(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``hidden + module(x)``, in one operation where the module is plain and small."""
    if _plain(module) and module.bias is None and autocast_dtype(module.weight.device) is None:
        if not _large(module.weight):
            transposed = module.weight.t()
            return lambda hidden, x: torch.addmm(hidden, x, transposed)
        module = _linear(module)
    return lambda hidden, x: hidden + module(x)


def _linear(module: Any) -> Callable[[Tensor], Tensor]:
    """The module, or the same product in the order that suits a few rows."""
    if not _plain(module) or not _large(module.weight) or autocast_dtype(module.weight.device) is not None:
        return module
    return partial(few_rows_linear, weight=module.weight, bias=module.bias)


def _large(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _LARGE_WEIGHT


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with the weight as the left factor if x ``[n, in]`` has from 2 to 8 rows.

    A large float32 matrix times a few rows is limited by reading the matrix, and CPU kernels read it up to four times
    faster if its rows, not those of ``x``, are the rows of the product (measured with MKL: 11 against 42 GB/s for 4
    rows, 12 against 18 for 8).
    """
    if not 1 < len(x) <= _FEW_ROWS:
        return F.linear(x, weight, bias)
    product = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())  # [out, n]
    return product.t().contiguous()
