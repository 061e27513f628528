# SPDX-License-Identifier: Apache-2.0
"""The tiles behind `lit_rl.policies.divergence`: what is computed when, and what is kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_rl.policies.head import _Gradients, _Head, _live_rows, _matmul, _operand
from lit_rl.policies.head import _slices as slices
from lit_rl.policies.scoring import Head

if TYPE_CHECKING:
    from lit_rl.objectives import Divergence

_FULL_ROWS_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Room for the logits of both models over the whole vocabulary, for as many tokens as fit."""
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Part of them that is worked on at a time: on a CPU it stays in the cache."""


def full_rows_bytes(device: torch.device) -> int:
    """How much memory the logits of a few tokens over the whole vocabulary may take."""
    return _FULL_ROWS_BYTES.get(device.type, 128 << 20)


Blocks = list[tuple[slice, Tensor]]
"""Words, and a number for each token and each of these words."""


class View(NamedTuple):
    """One model's view of M tokens: hidden states ``[M, H]`` and the head that turns them into logits."""

    hidden: Tensor
    head: Head


class Notes(dict[str, Tensor]):
    """What is seen on the way to the divergences of M tokens: name -> ``[M]``, without gradient.

    Over the whole vocabulary: ``student_entropy``, ``teacher_entropy`` and ``reverse`` (KL(student || teacher),
    whatever divergence is asked for), all in nats, and with ``entry_clip`` the number of ``clipped`` summands. With
    ``top_k``: the ``student_mass`` and ``teacher_mass`` on the teacher's k most likely words, and their ``overlap``,
    the share of them that are among the student's own (NaN at tokens where nobody looked).
    """

    def begin(self, like: Tensor, clip: float | None) -> None:
        """Nothing was seen yet of the tokens of ``like`` (``[M]``)."""
        names = ("student_entropy", "teacher_entropy", "reverse", *(() if clip is None else ("clipped",)))
        self.update({name: torch.zeros_like(like) for name in names})

    def add(self, rows: slice, log_p: Tensor, log_q: Tensor, values: Tensor, clip: float | None) -> None:
        """Some tokens x some words: log-probabilities and summands, clipped already."""
        product = log_p.exp()
        self["reverse"][rows] += torch.linalg.vecdot(product, log_p - log_q)
        self["student_entropy"][rows] -= torch.linalg.vecdot(product, log_p)
        self["teacher_entropy"][rows] -= torch.linalg.vecdot(torch.exp(log_q, out=product), log_q)
        if clip is not None:
            self["clipped"][rows] += (values == clip).sum(1)


@dataclass(frozen=True)
class Side:
    """One model's operands in the type they are computed in, and how its work is cut."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: _Head
    accumulate: torch.dtype

    @classmethod
    def of(cls, view: View, temperature: float, vocab_size: int, chunk_tokens: int | None) -> Side:
        weight, bias, softcap = view.head.weight, view.head.bias, view.head.softcap
        if weight is None:
            raise ValueError("This needs a head that is a plain linear layer (no LoRA, no quantised weights on it).")
        compute = weight.dtype
        if torch.is_autocast_enabled(weight.device.type) and compute != torch.float64:
            compute = torch.get_autocast_dtype(weight.device.type)
        # softcap * tanh(scale * x / softcap) / temperature, written without a scale
        scale = view.head.scale
        head = _Head(vocab_size, temperature / scale, None if softcap is None else softcap / scale, False, chunk_tokens)
        # Conversions happen outside the autograd function, so that each gradient returns in the type of its input.
        return cls(
            view.hidden.to(compute),
            weight.to(compute),
            None if bias is None else bias.to(compute),
            head,
            torch.float64 if compute == torch.float64 else torch.float32,
        )

    def detached(self) -> Side:
        """The same without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return Side(self.hidden.detach(), self.weight.detach(), bias, self.head, self.accumulate)

    def chunks(self) -> list[slice]:
        """Slices of the tokens whose logits over the whole vocabulary exist at once (in two models)."""
        room = full_rows_bytes(self.hidden.device)
        fitting = max(1, room // (2 * self.head.vocab_size * self.accumulate.itemsize))
        return list(slices(len(self.hidden), self.head.chunk_tokens or fitting))

    def room(self, tokens: int) -> Tensor:
        """Memory for `full_rows` of so many tokens, used again for every chunk."""
        h = _operand(self.hidden[:1], self.accumulate)
        numbers = tokens * self.head.vocab_size if h.dtype == self.accumulate else 0  # CUDA's half precision needs none
        return h.new_empty(numbers, dtype=self.accumulate)

    def full_rows(self, rows: slice, room: Tensor) -> Blocks:
        """Logits of some tokens over the whole vocabulary, as blocks of words."""
        h = _operand(self.hidden[rows], self.accumulate)
        block = _BLOCK_BYTES.get(h.device.type, 1 << 20) // 4  # the same cuts for both models, whatever their types
        return [
            (words, self.tile(h, words, room[len(h) * words.start : len(h) * words.stop]))
            for words in slices(self.head.vocab_size, max(1, block // max(1, len(h))))
        ]

    def tile(self, h: Tensor, words: slice, buffer: Tensor) -> Tensor:
        """Logits of some tokens over some words."""
        w = _operand(self.weight[words], self.accumulate)
        return self.head.logits(h, w, None if self.bias is None else self.bias[words], buffer)


def _normaliser(blocks: Blocks) -> Tensor:
    """``[C]``: log of the sum of exponentials over all blocks."""
    top = torch.stack([z.amax(1) for _, z in blocks]).amax(0)
    mass = torch.zeros_like(top)
    for _, z in blocks:
        mass += (z - top[:, None]).exp_().sum(1)
    return top + mass.log()


class Known(NamedTuple):
    """Gradients that were made in the forward pass, for the weights ``[M]`` that the caller announced."""

    weights: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def scale_for(self, grad: Tensor) -> Tensor | None:
        """The factor between the incoming gradient ``[M]`` and the announced weights; None if it is not one number."""
        if not len(grad):
            return None
        square = self.weights.square().sum()
        scale = (grad * self.weights).sum() / square
        expected = scale * self.weights
        tolerance = 100 * torch.finfo(grad.dtype).eps * expected.abs().amax()
        return scale if bool((square > 0) & ((grad - expected).abs().amax() <= tolerance)) else None

    def scaled(self, scale: Tensor, like: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of hidden states, weight and bias, in the types of these; overwrites what is kept here."""
        mine = (self.hidden, self.weight, self.bias)
        return tuple(x if x is None or y is None else x.mul_(scale).to(y.dtype) for x, y in zip(mine, like))


class TiledDivergence(torch.autograd.Function):
    """Forward: a few tokens x the whole vocabulary. Backward: tiles again, unless the forward pass made gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Side,
        theirs: Side,
        divergence: Divergence,
        weights: Tensor | None,
        notes: Notes | None,
    ) -> Tensor:
        own = Side(hidden, weight, bias, own.head, own.accumulate)
        totals, slope, lse_p, lse_q = (hidden.new_empty(len(hidden), dtype=own.accumulate) for _ in range(4))  # [M]
        work = None if weights is None else _EarlyGradients(own, weights.to(own.accumulate), ctx.needs_input_grad)
        if notes is not None:
            notes.begin(totals, divergence.entry_clip)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = own.chunks()
            room_p, room_q = own.room(chunks[0].stop if chunks else 0), theirs.room(chunks[0].stop if chunks else 0)
            for rows in chunks:
                p, q = own.full_rows(rows, room_p), theirs.full_rows(rows, room_q)
                lse_p[rows], lse_q[rows] = _normaliser(p), _normaliser(q)
                slopes_of = [own.head.slope(z) for _, z in p] if work is not None else []
                totals[rows], slope[rows] = _sums(divergence, p, q, lse_p[rows], lse_q[rows], notes, rows)
                if work is not None:
                    work.add(rows, p, q, slope[rows], slopes_of, divergence.beyond(totals[rows]))
        ctx.own, ctx.theirs, ctx.divergence = own.head, (theirs.head, theirs.accumulate), divergence
        ctx.accumulate, ctx.known = own.accumulate, None if work is None else work.known()
        ctx.save_for_backward(
            hidden, weight, bias, theirs.hidden, theirs.weight, theirs.bias, lse_p, lse_q, slope, totals
        )
        return divergence.bounded(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, *numbers = ctx.saved_tensors
        lse_p, lse_q, slope, totals = numbers
        grad = grad.masked_fill(ctx.divergence.beyond(totals), 0.0)
        known, ctx.known = ctx.known, None  # scaled in place: good for one backward pass
        scale = None if known is None else known.scale_for(grad)
        if known is not None and scale is not None:
            return *known.scaled(scale, (hidden, weight, bias)), None, None, None, None, None
        theirs = Side(teacher_hidden, teacher_weight, teacher_bias, *ctx.theirs)
        live = _live_rows(grad)
        work = _DivergenceGradients(ctx.own, weight, bias, ctx.accumulate, ctx.needs_input_grad, theirs, ctx.divergence)
        tokens = _Compared(hidden, teacher_hidden, lse_p, lse_q, slope, grad)
        with torch.autocast(hidden.device.type, enabled=False):
            work.run(tokens if live is None else tokens[live])  # type: ignore[arg-type]
        return *_scattered(work, hidden, live), None, None, None, None, None


def _sums(
    divergence: Divergence, p: Blocks, q: Blocks, lse_p: Tensor, lse_q: Tensor, notes: Notes | None, rows: slice
) -> tuple[Tensor, Tensor]:
    """Sums over the vocabulary of the (clipped) summands and of their slopes, both ``[C]``, for the tokens ``rows``.

    Afterwards the blocks of ``p`` hold log-probabilities and those of ``q`` the slopes.
    """
    total, slope = torch.zeros_like(lse_p), torch.zeros_like(lse_p)
    for (_, z_p), (_, z_q) in zip(p, q, strict=True):
        log_p, log_q = z_p.sub_(lse_p[:, None]), z_q.sub_(lse_q[:, None])
        values, slopes = _summands(divergence, log_p, log_q.to(z_p.dtype))
        if notes is not None:
            notes.add(rows, log_p, log_q.to(z_p.dtype), values, divergence.entry_clip)
        total += values.sum(1)
        slope += slopes.sum(1)
        z_q.copy_(slopes)
    return total, slope


def _summands(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Summands and slopes of one tile; a clipped summand is constant, so its slope is 0."""
    values, slopes = divergence.entries(log_p, log_q), divergence.slopes(log_p, log_q)
    if divergence.entry_clip is not None:
        slopes.masked_fill_(values > divergence.entry_clip, 0.0)
        values.clamp_(max=divergence.entry_clip)
    return values, slopes


class _EarlyGradients:
    """Gradients of ``sum_t weights_t D_t``, made while the logits are there."""

    def __init__(self, own: Side, weights: Tensor, needs: tuple[bool, ...]) -> None:
        self.own, self.weights = own, weights.clone()
        self.hidden = own.hidden.new_zeros(own.hidden.shape, dtype=own.accumulate) if needs[0] else None
        self.weight = own.weight.new_zeros(own.weight.shape, dtype=own.accumulate) if needs[1] else None
        self.bias = (
            own.bias.new_zeros(len(own.bias), dtype=own.accumulate) if own.bias is not None and needs[2] else None
        )

    def add(
        self, rows: slice, p: Blocks, q: Blocks, slope: Tensor, slopes_of: list[Tensor | float], beyond: Tensor
    ) -> None:
        """Some tokens: log-probabilities (overwritten), slopes, their sums, slopes of the logits, clipped tokens."""
        own, accumulate = self.own, self.own.accumulate
        self.weights[rows].masked_fill_(beyond, 0.0)
        h = _operand(own.hidden[rows], accumulate)
        for (words, log_p), (_, slopes), of_logits in zip(p, q, slopes_of, strict=True):
            z = log_p.exp_().mul_(-slope[:, None]).add_(slopes).mul_(self.weights[rows][:, None]).mul_(of_logits)
            if self.hidden is not None:
                self.hidden[rows] += _matmul(z, _operand(own.weight[words], accumulate), accumulate)
            if self.weight is not None:
                self.weight[words] += _matmul(z.t(), h, accumulate)
            if self.bias is not None:
                self.bias[words] += z.sum(0)

    def known(self) -> Known:
        """What the backward pass needs of it."""
        return Known(self.weights, self.hidden, self.weight, self.bias)


def _scattered(work: _Gradients, hidden: Tensor, live: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias, the first with zeros where no gradient came in."""
    grad_hidden = work.hidden
    if grad_hidden is not None and live is not None:
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, live, grad_hidden)
    return grad_hidden, work.weight, work.bias


@dataclass(frozen=True)
class _Compared:
    """What the backward pass knows of some tokens: hidden states ``[L, H]``, all else ``[L]``."""

    hidden: Tensor
    teacher_hidden: Tensor
    lse_p: Tensor
    lse_q: Tensor
    slope: Tensor
    grad: Tensor

    def __getitem__(self, rows: Tensor | slice) -> _Compared:
        return _Compared(**{name: x[rows] for name, x in vars(self).items()})


class _DivergenceGradients(_Gradients):
    """The gradient of logit ``z_v`` is ``g (a_v - p_v A)``, with g the incoming gradient of the token's divergence."""

    def __init__(
        self,
        head: _Head,
        weight: Tensor,
        bias: Tensor | None,
        accumulate: torch.dtype,
        needs: tuple[bool, ...],
        theirs: Side,
        divergence: Divergence,
    ) -> None:
        super().__init__(head, weight, bias, accumulate, needs)
        self.theirs, self.divergence = theirs, divergence
        self._room: Tensor | None = None

    def logit_gradient(self, z: Tensor, tokens: Any, words: slice) -> Tensor:
        """Gradient of one tile of raw products ``[C, tile]`` from its logits ``z``."""
        slope = self.head.slope(z)
        if self._room is None or self._room.numel() < z.numel():
            self._room = z.new_empty(z.numel(), dtype=self.theirs.accumulate)
        teacher = self.theirs.tile(_operand(tokens.teacher_hidden, self.theirs.accumulate), words, self._room)
        log_q = teacher.sub_(tokens.lse_q[:, None]).to(z.dtype)
        log_p = z.sub_(tokens.lse_p[:, None])
        if self.divergence.entry_clip is None:
            gradient = self.divergence.slopes(log_p, log_q)
        else:
            gradient = _summands(self.divergence, log_p, log_q)[1]
        gradient.addcmul_(log_p.exp_(), tokens.slope[:, None], value=-1.0)
        gradient.mul_(tokens.grad[:, None])
        return gradient.mul_(slope)


class GatheredLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, own: Side) -> Tensor:
        own = Side(hidden, weight, bias, own.head, own.accumulate)
        chosen = hidden.new_zeros(ids.shape, dtype=own.accumulate)  # [M, K]
        lse = hidden.new_empty(len(hidden), dtype=own.accumulate)  # [M]
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = own.chunks()
            room = own.room(chunks[0].stop if chunks else 0)
            for rows in chunks:
                blocks = own.full_rows(rows, room)
                lse[rows] = _normaliser(blocks)
                for words, z in blocks:
                    column, inside = _columns(ids[rows], words)
                    chosen[rows] = torch.where(inside, z.gather(1, column), chosen[rows])
        ctx.own, ctx.accumulate = own.head, own.accumulate
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        return chosen - lse[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        live = _live_rows(grad.abs().sum(1))
        work = _GatheredGradients(ctx.own, weight, bias, ctx.accumulate, ctx.needs_input_grad)
        tokens = _Gathered(hidden, ids, lse, grad)
        with torch.autocast(hidden.device.type, enabled=False):
            work.run(tokens if live is None else tokens[live])  # type: ignore[arg-type]
        return *_scattered(work, hidden, live), None, None


@dataclass(frozen=True)
class _Gathered:
    """What the backward pass knows of some tokens: ``[L, H]``, ``[L, K]``, ``[L]``, ``[L, K]``."""

    hidden: Tensor
    ids: Tensor
    lse: Tensor
    grad: Tensor

    def __getitem__(self, rows: Tensor | slice) -> _Gathered:
        return _Gathered(**{name: x[rows] for name, x in vars(self).items()})


class _GatheredGradients(_Gradients):
    """The gradient of logit ``z_v`` is ``sum_k g_k [v = id_k] - p_v sum_k g_k``."""

    def logit_gradient(self, z: Tensor, tokens: Any, words: slice) -> Tensor:
        """Gradient of one tile of raw products ``[C, tile]`` from its logits ``z``, whose memory it takes."""
        slope = self.head.slope(z)
        z.sub_(tokens.lse[:, None]).exp_().mul_(-tokens.grad.sum(1, keepdim=True))
        column, inside = _columns(tokens.ids, words)
        z.scatter_add_(1, column, torch.where(inside, tokens.grad, 0.0))
        return z.mul_(slope)


def _columns(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column of each id in a tile, and whether it lies there, both ``[C, K]``."""
    inside = (ids >= words.start) & (ids < words.stop)
    return (ids - words.start).clamp(0, words.stop - words.start - 1), inside
