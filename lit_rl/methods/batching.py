# SPDX-License-Identifier: Apache-2.0
"""How a batch of rollouts is split into mini-batches (one optimizer step each) and micro-batches (one pass each)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts

# A pass of a small model on a CPU takes as long as about a hundred of its tokens; an accelerator needs some thousands
# of tokens before launching kernels is not what takes the time.
_PASS_TOKENS = {"cpu": 128}


def mini_batch(rollouts: Rollouts, updates: int, index: int) -> Rollouts:
    """One of ``updates`` mini-batches, as a copy: groups are dealt out in turn, so that ranks do not change the split.

    Args:
        rollouts: the batch of one rank.
        updates: number of mini-batches; the same on every rank, one of them may be empty.
        index: which of them.
    """
    return rollouts.select(rollouts.group % updates == index)


def sequence_lengths(rollouts: Rollouts) -> Tensor:
    """``[N]``: prompt tokens plus completion tokens of each row, what a forward pass over it costs."""
    prompts = torch.tensor([len(ids) for ids in rollouts.prompts.ids], dtype=torch.long)
    return prompts[rollouts.group.cpu()] + rollouts.lengths.cpu()


def micro_batches(rollouts: Rollouts, max_tokens: int, pass_tokens: int | None = None) -> list[Tensor]:
    """Row indices of micro-batches: sorted by length, at most ``max_tokens`` padded tokens each, units kept whole.

    Among all such splits the one with the least work is taken: padded tokens, plus a fixed price for each pass. So a
    batch with a few long rows is not padded to their length as a whole, even where it would fit.

    Args:
        rollouts: the rows to split.
        max_tokens: bound on rows × longest row. A unit that is larger on its own becomes a micro-batch of its own.
        pass_tokens: what a forward and backward pass costs beside its tokens, in tokens; default by kind of device.

    Returns:
        Int tensors that together hold every row once; the longest rows come first, so that running out of memory
        happens at the start.
    """
    if len(rollouts) == 0:
        return []
    price = pass_tokens if pass_tokens is not None else _PASS_TOKENS.get(rollouts.device.type, 2048)
    lengths = sequence_lengths(rollouts)
    units, unit_of = torch.unique(rollouts.unit.cpu(), return_inverse=True)
    unit_longest = torch.zeros(len(units), dtype=torch.long).scatter_reduce(0, unit_of, lengths, "amax")
    unit_rows = torch.bincount(unit_of, minlength=len(units))
    order = torch.argsort(unit_longest, descending=True, stable=True)
    ends = _cheapest_cuts(unit_rows[order].numpy(), unit_longest[order].numpy(), max_tokens, price)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    row_order = torch.argsort(rank[unit_of], stable=True)
    rows_before = torch.cat([torch.zeros(1, dtype=torch.long), unit_rows[order].cumsum(0)])
    return list(torch.split(row_order, rows_before[[0, *ends]].diff().tolist()))


def split(batch: Rollouts, parts: list[Tensor]) -> list[Rollouts]:
    """The parts of a batch, each no wider than its longest completion.

    Args:
        batch: N rows.
        parts: int ``[n]`` each, rows of the batch (from `micro_batches`, for example).

    Returns:
        A batch for each part, its rows in the given order. Signals are views of one copy of the batch's: what is
        written into a part reaches neither the batch nor another part.
    """
    if not parts:
        return []
    ordered = batch.select(torch.cat(parts))
    ends = list(accumulate(len(rows) for rows in parts))
    return [ordered.between(start, end).trim() for start, end in zip([0, *ends], ends)]


def _cheapest_cuts(rows: Any, longest: Any, max_tokens: int, price: int) -> list[int]:
    """Ends of the parts of a sequence of units that cost least, by dynamic programming.

    Args:
        rows: ``[U]`` numpy array, rows of each unit.
        longest: ``[U]`` numpy array, longest row of each unit, in descending order.
        max_tokens: bound on a part's rows × longest row, unless it is a single unit.
        price: cost of a part beside its rows × longest row.
    """
    import numpy as np

    before = np.concatenate([[0], np.cumsum(rows)])
    if before[-1] * longest[0] <= max_tokens:  # nothing must be cut, so never between units of one length
        last = np.append(np.flatnonzero(np.diff(longest)), len(longest) - 1)  # unit of each length
        if len(last) < len(rows):
            parts = _cheapest_cuts(np.diff(before[last + 1], prepend=0), longest[last], max_tokens, price)
            return [int(last[part - 1]) + 1 for part in parts]
    least, start = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, dtype=int)  # cost of the first j units; last cut
    for j in range(1, len(rows) + 1):
        tokens = (before[j] - before[:j]) * longest[:j]  # of a last part that starts at unit i and ends before j
        cost = least[:j] + tokens
        cost[:-1][tokens[:-1] > max_tokens] = np.inf
        start[j] = cost.argmin()
        least[j] = cost[start[j]] + price
    ends = [len(rows)]
    while start[ends[-1]]:
        ends.append(int(start[ends[-1]]))
    return ends[::-1]
