# SPDX-License-Identifier: Apache-2.0
"""Divergences between two models over the whole vocabulary, from hidden states, in tiles.

Two models' logits for M tokens over V words are 2 x M x V numbers, and a plain implementation keeps several times that
for its backward pass. Here a few tokens at a time meet the whole vocabulary. Every divergence of the form
``sum_v f(p_v, q_v)`` has the gradient ``a_v - p_v A`` in the student's logits, with ``a_v`` the slope of f in log p_v
and A the sum of the slopes. If the weights of the tokens in the loss are known in advance, that gradient is turned into
those of hidden states and head on the spot (as in Liger's fused losses, arXiv 2410.10989); if not, a tile of some
tokens x some words at a time is computed again in the backward pass, for which a few numbers per token are kept.

The arithmetic of a tile (precision, soft-capping, cuts) is that of `lit_rl.policies.head`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rl.policies.divergence_tiles import (
    GatheredLogprobs,
    Notes,
    Side,
    TiledDivergence,
    View,
    full_rows_bytes,
    slices,
)

if TYPE_CHECKING:
    from lit_rl.objectives import Divergence


_LOOKED_AT = 64  # tokens of a batch whose student is asked for its own most likely words, which takes another pass


class Comparison(NamedTuple):
    """How two models differ at M tokens, all ``[M]`` in nats and without gradient."""

    forward: Tensor
    """KL(teacher || student)"""
    reverse: Tensor
    """KL(student || teacher)"""
    jsd: Tensor
    """Jensen-Shannon divergence, both models weighted alike; at most ln 2"""
    student_entropy: Tensor
    teacher_entropy: Tensor


def vocabulary_divergence(
    student: View,
    teacher: View,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    notes: Notes | None = None,
) -> Tensor:
    """The divergence of two next-token distributions at each of M tokens.

    Args:
        student: its hidden states and head receive gradients.
        teacher: receives none.
        divergence: which one.
        temperature: divides both models' (soft-capped) logits; greater than 0.
        weights: ``[M]``, how the caller is going to weigh the tokens, up to one common factor. Then the gradients are
            made in the forward pass, while the logits are there. Should another gradient come in, or without weights,
            every logit is computed a second time in the backward pass; the result is the same.
        vocab_size: words from here on have no probability in either model. Default: all that both heads have.
        chunk_tokens: how many tokens meet the whole vocabulary at once. Default: as many as fit into 128 MiB (512 MiB
            on CUDA). Results agree to rounding.
        notes: takes what is seen on the way; nothing with a head that is more than a linear layer.

    Returns:
        ``[M]``, float64 if the student's head is, else float32. Tokens whose incoming gradient is zero cost nothing in
        the backward pass.

    Raises:
        ValueError: shapes, temperature or vocabulary do not fit.
    """
    vocab_size = _checked_vocab(student, teacher, temperature, vocab_size)
    if student.head.weight is None or teacher.head.weight is None:
        return _checkpointed(student, teacher, divergence, temperature, vocab_size, chunk_tokens or 64)
    if divergence.top_k is not None and divergence.top_k < vocab_size:
        log_q, top = top_logprobs(teacher, divergence.top_k, temperature=temperature, vocab_size=vocab_size)
        log_p = gathered_logprobs(student, top, temperature=temperature, vocab_size=vocab_size)
        if notes is not None:
            notes |= {"student_mass": log_p.detach().exp().sum(-1), "teacher_mass": log_q.exp().sum(-1)}
            notes["overlap"] = _overlap(student, top, temperature, vocab_size)
        return divergence.total_of_top(log_p, log_q.to(log_p))
    own, theirs = (Side.of(view, temperature, vocab_size, chunk_tokens) for view in (student, teacher))
    if not torch.is_grad_enabled():
        weights = None
    return TiledDivergence.apply(own.hidden, own.weight, own.bias, own, theirs.detached(), divergence, weights, notes)


@torch.no_grad()
def _overlap(student: View, top: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """``[M]``: share of the words ``[M, k]`` among the student's own k most likely; NaN but for some evenly chosen."""
    found = torch.full((len(top),), math.nan, device=top.device)
    if not len(top):
        return found
    looked_at = torch.arange(0, len(top), max(1, -(-len(top) // _LOOKED_AT)), device=top.device)
    view = View(student.hidden[looked_at], student.head)
    _, own = top_logprobs(view, top.shape[1], temperature=temperature, vocab_size=vocab_size)
    found[looked_at] = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(top[looked_at], own)])
    return found


@torch.no_grad()
def compare(student: View, teacher: View, *, temperature: float = 1.0, vocab_size: int | None = None) -> Comparison:
    """Both KL divergences, the Jensen-Shannon divergence and both entropies at each of M tokens, in one pass.

    Arguments are those of `vocabulary_divergence`.
    """
    vocab_size = _checked_vocab(student, teacher, temperature, vocab_size)
    room = full_rows_bytes(student.hidden.device) // 4
    parts: list[tuple[Tensor, ...]] = []
    for rows in slices(len(student.hidden), max(1, room // (8 * vocab_size))):
        log_p, log_q = (
            (view.head.logits(view.hidden[rows])[:, :vocab_size] / temperature).log_softmax(-1)
            for view in (student, teacher)
        )
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        jsd = (p * (log_p - log_m)).sum(-1) / 2 + (q * (log_q - log_m)).sum(-1) / 2
        forward, reverse = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
        parts.append((forward, reverse, jsd, -(p * log_p).sum(-1), -(q * log_q).sum(-1)))
    if not parts:
        parts = [(student.hidden.new_zeros(0, dtype=torch.float32),) * 5]
    return Comparison(*(torch.cat(column) for column in zip(*parts)))


@torch.no_grad()
def top_logprobs(
    view: View, k: int, *, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely words at each of M tokens.

    Args:
        view: M hidden states and their head (a plain linear one).
        k: how many.
        temperature: divides the logits.
        vocab_size: words from here on have no probability.

    Returns:
        Log-probabilities (over the whole vocabulary) and ids, both ``[M, k]``, most likely first.
    """
    side = Side.of(view, temperature, view.head.vocab_size if vocab_size is None else vocab_size, None)
    parts, chunks = [], side.chunks()
    room = side.room(chunks[0].stop if chunks else 0)
    for rows in chunks:
        blocks = side.full_rows(rows, room)
        z = torch.cat([block for _, block in blocks], 1)
        values, ids = z.topk(k, dim=-1)
        parts.append((values - z.logsumexp(-1, keepdim=True), ids))
    if not parts:
        empty = side.hidden.new_zeros(0, k, dtype=side.accumulate)
        return empty, empty.long()
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def gathered_logprobs(view: View, ids: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Log-probabilities of several words at each of M tokens, differentiable like `selected_logprobs`.

    Args:
        view: M hidden states and their head (a plain linear one); both receive gradients.
        ids: ``[M, K]`` int, the words.
        temperature: divides the logits.
        vocab_size: words from here on have no probability.

    Returns:
        ``[M, K]``.
    """
    side = Side.of(view, temperature, view.head.vocab_size if vocab_size is None else vocab_size, None)
    return GatheredLogprobs.apply(side.hidden, side.weight, side.bias, ids, side)


def _checked_vocab(student: View, teacher: View, temperature: float, vocab_size: int | None) -> int:
    if student.hidden.ndim != 2 or teacher.hidden.ndim != 2 or len(student.hidden) != len(teacher.hidden):
        shapes = f"{tuple(student.hidden.shape)} and {tuple(teacher.hidden.shape)}"
        raise ValueError(f"Student and teacher must look at the same M tokens, hidden states [M, H]; got {shapes}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number greater than 0, got {temperature}.")
    common = min(student.head.vocab_size, teacher.head.vocab_size)
    if vocab_size is not None and not 0 < vocab_size <= common:
        raise ValueError(f"vocab_size must be between 1 and the {common} words of the shorter head, got {vocab_size}.")
    return common if vocab_size is None else vocab_size


def _checkpointed(
    student: View, teacher: View, divergence: Divergence, temperature: float, vocab_size: int, chunk_tokens: int
) -> Tensor:
    """The slower way, for heads that are more than a linear layer: logits through the modules, a chunk at a time."""

    def chunk(mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            q = teacher.head.logits(theirs)[:, :vocab_size] / temperature
        return divergence.of_logits(student.head.logits(mine)[:, :vocab_size] / temperature, q)

    parts = [
        checkpoint(chunk, mine, theirs, use_reentrant=False)
        for mine, theirs in zip(student.hidden.split(chunk_tokens), teacher.hidden.detach().split(chunk_tokens))
    ]
    return torch.cat(parts)
