# SPDX-License-Identifier: Apache-2.0
"""The language-model head in tiles: log-probabilities and entropies without ever holding all the logits.

The logits of M tokens over V words need M x V numbers, more than the rest of a training step for today's vocabularies.
Here they exist one tile (some tokens x some words) at a time. The forward pass keeps a running maximum and sum per
token, as online softmax does (Milakov and Gimelshein, arXiv 1805.02867); the backward pass computes each tile again and
turns it into gradients of the hidden states and of the weight at once, as Cut Cross-Entropy does (arXiv 2411.09009).
Only the inputs and one log-normaliser per token are kept in between.

Precision: float32 and float64 inputs are computed in their own type. For float16 and bfloat16 inputs the products are
accumulated *and delivered* in float32, because rounding the logits themselves to bfloat16 costs up to 0.06 nats per
token at a logit of 16. On CUDA this is a matrix product with float32 output, elsewhere each weight tile is
converted when it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
_ROWS = {"cpu": 1024, "cuda": 4096}
_HALF = (torch.float16, torch.bfloat16)


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of one word per token under a linear head, and the entropy of each distribution.

    With raw logits ``x = hidden @ weight.T + bias`` and ``z = softcap * tanh(x / softcap) / temperature`` (``z = x /
    temperature`` without soft-capping) this returns ``log softmax(z)[target]`` and ``-sum_v p_v log p_v``. Both are
    differentiable once, with respect to ``hidden``, ``weight`` and ``bias``. Tokens whose incoming gradient is zero
    cost nothing in the backward pass.

    Args:
        hidden: ``[M, H]`` hidden states; M may be 0. Converted to the type of ``weight`` if that differs.
        weight: ``[V, H]`` head weight. A tied embedding simply receives the gradient.
        targets: ``[M]`` integer word ids, each in ``[0, vocab_size)``.
        bias: ``[V]`` head bias.
        temperature: divides the (soft-capped) logits; greater than 0.
        softcap: bound of the logits of Gemma 2; greater than 0.
        vocab_size: rows of ``weight`` from here on are padding and get no probability. Default: all V rows count.
        entropy: also return the entropies.
        chunk_tokens: how many tokens a tile may hold. Default: 1024 (4096 on CUDA). Results agree to rounding.

    Returns:
        Log-probabilities ``[M]`` and entropies ``[M]`` (None unless asked for) in nats, float64 for float64 inputs and
        float32 otherwise.

    Raises:
        ValueError: if a shape, range or target is impossible.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, targets, bias, temperature, softcap, vocab_size, chunk_tokens)
    compute = weight.dtype
    if torch.is_autocast_enabled(weight.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(weight.device.type)
    # Conversions happen outside the function, so that autograd returns each gradient in the type of its input.
    hidden, weight = hidden.to(compute), weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    head = _Head(vocab_size, float(temperature), softcap, entropy, chunk_tokens)
    return _SelectedLogprobs.apply(hidden, weight, bias, targets.long(), head)


def tile_bytes(device: str, tokens: int, vocab_size: int, chunk_tokens: int | None = None) -> int:
    """Size of a tile of float32 logits on a kind of device (``"cpu"``, ``"cuda"``)."""
    head = _Head(vocab_size, 1.0, None, False, chunk_tokens)
    chunks, tiles = head.cuts(tokens, torch.device(device), 4)
    return 4 * chunks[0].stop * tiles[0].stop if chunks else 0


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    chunk_tokens: int | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight must be [M, H] and [V, H], got {shapes}.")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets must be {hidden.shape[0]} integer ids, got {targets.dtype} {tuple(targets.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one entry per row of weight ({weight.shape[0]}), got {tuple(bias.shape)}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number greater than 0, got {temperature}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be greater than 0, or None for a head without soft-capping, got {softcap}.")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be between 1 and the {weight.shape[0]} rows of weight, got {vocab_size}.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
    if targets.numel() and bool(((targets < 0) | (targets >= vocab_size)).any()):
        raise ValueError(f"targets must be in [0, {vocab_size}), got {int(targets.min())} to {int(targets.max())}.")


class _Head(NamedTuple):
    """What turns products into distributions, and how the work is cut."""

    vocab_size: int
    temperature: float
    softcap: float | None
    entropy: bool
    chunk_tokens: int | None

    @property
    def scale(self) -> float:
        """Factor on the raw logits that the matrix product can apply for free."""
        return 1.0 / (self.temperature if self.softcap is None else self.softcap)

    def cuts(self, tokens: int, device: torch.device, itemsize: int) -> tuple[list[slice], list[slice]]:
        """Slices of the tokens and of the vocabulary whose products are the tiles."""
        room = _TILE_BYTES.get(device.type, 128 << 20) // itemsize
        rows = self.chunk_tokens or max(_ROWS.get(device.type, 4096), room // self.vocab_size)
        rows = max(1, min(rows, tokens))
        words = max(1, min(room // rows, self.vocab_size))
        return list(_slices(tokens, rows)), list(_slices(self.vocab_size, words))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
        """One tile of logits, soft-capped and divided by the temperature, in the accumulation type."""
        if hidden.dtype != buffer.dtype:
            z = torch.mm(hidden, weight.t(), out_dtype=buffer.dtype)
            z = z.mul_(self.scale) if bias is None else z.add_(bias).mul_(self.scale)
        else:
            z = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            start, beta = (z, 0.0) if bias is None else (bias.to(buffer.dtype), self.scale)
            torch.addmm(start, hidden, weight.t(), beta=beta, alpha=self.scale, out=z)
        return z if self.softcap is None else z.tanh_().mul_(self.softcap / self.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of the final logits ``z`` with respect to the raw products."""
        if self.softcap is None:
            return 1.0 / self.temperature
        tanh = z * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1.0).div_(self.temperature)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _operand(x: Tensor, accumulate: torch.dtype) -> Tensor:
    """Half precision goes into CUDA's matrix product as it is; elsewhere it is converted tile by tile."""
    return x if x.device.type == "cuda" and x.dtype in _HALF else x.to(accumulate)


def _matmul(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    return torch.mm(a, b) if b.dtype == accumulate else torch.mm(a.to(b.dtype), b, out_dtype=accumulate)


def _at_targets(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a tile ``[C, 1]``, and whether it lies there ``[C]``."""
    inside = (targets >= words.start) & (targets < words.stop)
    return (targets - words.start).clamp(0, words.stop - words.start - 1)[:, None], inside


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        chosen, lse, entropy = (hidden.new_empty(len(hidden), dtype=accumulate) for _ in range(3))  # [M]
        chunks, tiles = head.cuts(len(hidden), hidden.device, accumulate.itemsize)
        buffer = _buffer(chunks, tiles, hidden, accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                h = _operand(hidden[rows], accumulate)
                chosen[rows], lse[rows], entropy[rows] = _normalise(head, h, weight, bias, targets[rows], tiles, buffer)
        logprobs = chosen.sub_(lse)
        ctx.head, ctx.accumulate = head, accumulate
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy if head.entropy else None)
        return logprobs, entropy if head.entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        live = _live_rows(grad_logprobs, grad_entropy)
        work = _Gradients(ctx.head, weight, bias, ctx.accumulate, ctx.needs_input_grad)
        tokens = _Tokens(hidden, targets, lse, entropy, grad_logprobs, grad_entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            work.run(tokens if live is None else tokens[live])
        grad_hidden = work.hidden
        if grad_hidden is not None and live is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, live, grad_hidden)
        return grad_hidden, work.weight, work.bias, None, None


def _buffer(chunks: list[slice], tiles: list[slice], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the largest tile, used again for every one."""
    size = chunks[0].stop * tiles[0].stop if chunks else 0
    return like.new_empty(size, dtype=dtype)


def _normalise(
    head: _Head,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    tiles: list[slice],
    buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Target logit, log-normaliser and entropy ``[C]`` of some tokens, in one pass over the vocabulary."""
    top = buffer.new_full((len(h),), torch.finfo(buffer.dtype).min)  # running maximum of z
    mass, moment = torch.zeros_like(top), torch.zeros_like(top)  # sums of exp(z - top) and exp(z - top)(z - top)
    chosen = torch.zeros_like(top)
    for words in tiles:
        w = _operand(weight[words], buffer.dtype)
        z = head.logits(h, w, None if bias is None else bias[words], buffer)  # [C, tile]
        column, inside = _at_targets(targets, words)
        chosen = torch.where(inside, z.gather(1, column)[:, 0], chosen)
        higher = torch.maximum(top, z.amax(1))
        shift = top - higher
        z.sub_(higher[:, None])
        if head.entropy:
            p = torch.exp(z)
            moment = (moment + mass * shift) * shift.exp() + torch.linalg.vecdot(p, z)
        else:
            p = z.exp_()
        mass = mass * shift.exp() + p.sum(1)
        top = higher
    return chosen, top + mass.log(), mass.log() - moment / mass


def _live_rows(*grads: Tensor | None) -> Tensor | None:
    """Rows with any incoming gradient ``[L]``; None if all have some."""
    live = torch.stack([g != 0 for g in grads if g is not None]).any(0)
    return None if bool(live.all()) else live.nonzero()[:, 0]


@dataclass(frozen=True)
class _Tokens:
    """What the backward pass knows of some tokens: hidden states ``[L, H]``, all else ``[L]``."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    entropy: Tensor | None
    grad: Tensor | None
    grad_entropy: Tensor | None

    def __getitem__(self, rows: Tensor | slice) -> _Tokens:
        pick: dict[str, Any] = {name: None if x is None else x[rows] for name, x in vars(self).items()}
        return _Tokens(**pick)


class _Gradients:
    """Gradients of the inputs, summed tile by tile.

    With ``g`` and ``e`` the incoming gradients of log-probability and entropy, the gradient of logit ``z_v`` is
    ``g [v = target] - p_v (g + e (log p_v + entropy))``.
    """

    def __init__(
        self, head: _Head, weight: Tensor, bias: Tensor | None, accumulate: torch.dtype, needs: tuple[bool, ...]
    ) -> None:
        self.head, self.w, self.b, self.accumulate, self.needs = head, weight, bias, accumulate, needs
        self.hidden: Tensor | None = None
        # zeros, not empty: rows beyond vocab_size are padding and have no gradient
        self.weight = torch.zeros_like(weight) if needs[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

    def run(self, tokens: _Tokens) -> None:
        """Fill ``hidden`` (of these tokens), ``weight`` and ``bias``."""
        hidden, accumulate = tokens.hidden, self.accumulate
        chunks, tiles = self.head.cuts(len(hidden), hidden.device, accumulate.itemsize)
        buffer = _buffer(chunks, tiles, hidden, accumulate)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=accumulate) if self.needs[0] else None
        for words in tiles:  # outermost, so that each weight tile is converted and its gradient rounded only once
            w = _operand(self.w[words], accumulate)
            b = None if self.b is None else self.b[words]
            grad_w = None if self.weight is None else w.new_zeros(w.shape, dtype=accumulate)
            grad_b = None if self.bias is None else w.new_zeros(len(w), dtype=accumulate)
            for rows in chunks:
                h = _operand(hidden[rows], accumulate)
                z = self.logit_gradient(self.head.logits(h, w, b, buffer), tokens[rows], words)
                if grad_hidden is not None:
                    grad_hidden[rows] += _matmul(z, w, accumulate)
                if grad_w is not None:
                    grad_w += _matmul(z.t(), h, accumulate)
                if grad_b is not None:
                    grad_b += z.sum(0)
            if self.weight is not None and grad_w is not None:
                self.weight[words] = grad_w
            if self.bias is not None and grad_b is not None:
                self.bias[words] = grad_b
        self.hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)

    def logit_gradient(self, z: Tensor, tokens: _Tokens, words: slice) -> Tensor:
        """Gradient of one tile of raw products ``[C, tile]`` from its logits ``z``, whose memory it takes."""
        slope = self.head.slope(z)
        unit = slope if isinstance(slope, float) else 1.0  # without soft-capping the slope costs no pass over the tile
        g = torch.zeros_like(tokens.lse) if tokens.grad is None else tokens.grad * unit
        z.sub_(tokens.lse[:, None])  # log p
        if tokens.grad_entropy is None or tokens.entropy is None:
            z.exp_().mul_(-g[:, None])
        else:
            e = tokens.grad_entropy * unit
            pull = torch.addcmul((g + e * tokens.entropy)[:, None], z, e[:, None])
            z.exp_().mul_(pull.neg_())
        column, inside = _at_targets(tokens.targets, words)
        z.scatter_add_(1, column, torch.where(inside, g, 0.0)[:, None])
        return z if isinstance(slope, float) else z.mul_(slope)
