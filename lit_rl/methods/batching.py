# SPDX-License-Identifier: Apache-2.0
"""How a batch of rollouts is split into mini-batches (one optimizer step each) and micro-batches (one pass each)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts


def mini_batches(rollouts: Rollouts, updates: int) -> list[Rollouts]:
    """Deal the groups out to ``updates`` mini-batches in turn, so that the split does not depend on the ranks.

    Args:
        rollouts: the batch of one rank.
        updates: number of optimizer steps; the same on every rank, a mini-batch may be empty.
    """
    if updates == 1:
        return [rollouts]
    return [rollouts.select(rollouts.group % updates == k) for k in range(updates)]


def sequence_lengths(rollouts: Rollouts) -> Tensor:
    """``[N]``: prompt tokens plus completion tokens of each row, what a forward pass over it costs."""
    prompts = torch.tensor([len(ids) for ids in rollouts.prompts.ids], dtype=torch.long)
    return prompts[rollouts.group.cpu()] + rollouts.lengths.cpu()


def micro_batches(rollouts: Rollouts, max_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches: sorted by length, at most ``max_tokens`` padded tokens each, units kept whole.

    Args:
        rollouts: the rows to split.
        max_tokens: bound on rows × longest row. A unit that is larger on its own becomes a micro-batch of its own.

    Returns:
        Int tensors that together hold every row once; the longest rows come first, so that running out of memory
        happens at the start.
    """
    if len(rollouts) == 0:
        return []
    lengths = sequence_lengths(rollouts)
    units, unit_of = torch.unique(rollouts.unit.cpu(), return_inverse=True)
    unit_longest = torch.zeros(len(units), dtype=torch.long).scatter_reduce(0, unit_of, lengths, "amax")
    unit_rows = torch.bincount(unit_of, minlength=len(units))
    order = torch.argsort(unit_longest, descending=True, stable=True)
    rank = torch.empty_like(order)
    parts: list[int] = []
    part, rows, longest = 0, 0, 0
    for position, u in enumerate(order.tolist()):
        rank[u] = position
        n = int(unit_rows[u])
        if rows and (rows + n) * longest > max_tokens:
            part, rows, longest = part + 1, 0, 0
        longest = max(longest, int(unit_longest[u]))
        rows += n
        parts.append(part)
    row_order = torch.argsort(rank[unit_of], stable=True)
    part_of_row = torch.tensor(parts)[rank[unit_of]][row_order]
    return list(torch.split(row_order, torch.bincount(part_of_row).tolist()))
