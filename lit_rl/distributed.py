# SPDX-License-Identifier: Apache-2.0
"""Collectives that also work on a single process, where each is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks (1 outside distributed training)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, on every rank."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def all_max(values: Tensor) -> Tensor:
    """The elementwise maximum over ranks, on every rank."""
    if world_size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_ragged(values: Tensor) -> list[Tensor]:
    """One tensor from each rank, in rank order; they may differ in length along the first dimension."""
    if world_size() == 1:
        return [values]
    lengths = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
    longest = max(int(n) for n in lengths)
    padded = values.new_zeros((longest, *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [p[: int(n)] for p, n in zip(parts, lengths)]


def all_gather_concat(values: Tensor) -> tuple[Tensor, slice]:
    """The values of all ranks in one tensor, and where this rank's own are in it."""
    parts = gather_ragged(values)
    start = sum(len(p) for p in parts[: rank()])
    return torch.cat(parts), slice(start, start + len(values))


def union_of_names(names: Iterable[str]) -> list[str]:
    """The names of all ranks, each once, in the same order everywhere."""
    mine = list(names)
    if world_size() == 1:
        return mine
    return list(dict.fromkeys(name for part in gather_objects(mine) for name in part))


def gather_objects(value: Any) -> list[Any]:
    """One object from each rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def broadcast_object(value: object) -> object:
    """Rank 0's object, on every rank: for decisions that must be the same everywhere."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
