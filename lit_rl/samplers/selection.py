# SPDX-License-Identifier: Apache-2.0
"""Which completions of a pool are worth training on, and which prompts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Selection = Literal["best_worst", "mean_deviation", "extremes_random", "random"]


def select_from_pool(rewards: Tensor, keep: int, how: Selection = "best_worst", noise: Tensor | None = None) -> Tensor:
    """Indices of the completions to keep from the pool of one prompt (Sol-RL, arXiv 2604.06916).

    Completions that could not be scored (NaN) are taken only where the others do not suffice.

    Args:
        rewards: ``[P]``.
        keep: K, how many to keep; P if that is less.
        how: ``"best_worst"``: the floor(K/2) best, then the worst; ``"mean_deviation"``: those farthest from the mean;
            ``"extremes_random"``: the best, the worst, and others at random; ``"random"``.
        noise: ``[P]``, what random choices are taken by.

    Returns:
        int ``[K]``, without repetitions (the authors' code repeats indices when a pool is hardly larger than K).

    Raises:
        ValueError: unknown ``how``, or a random choice without ``noise``.
    """
    if how not in get_args(Selection):
        raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}, got {how!r}.")
    if noise is None and how in ("extremes_random", "random"):
        raise ValueError(f"selection {how!r} needs noise.")
    scored = ~torch.isnan(rewards)
    index = scored.nonzero()[:, 0]
    values = rewards[index]
    best = index[values.argsort(descending=True, stable=True)]
    worst = index[values.argsort(stable=True)]
    if how == "best_worst":
        order = _chain(best[: keep // 2], worst)
    elif how == "mean_deviation":
        order = index[(values - values.mean()).abs().argsort(descending=True, stable=True)]
    else:
        assert noise is not None
        order = index[noise[index].argsort(stable=True)]
        if how == "extremes_random":
            order = _chain(best[:1], worst[:1], order)
    return _chain(order, (~scored).nonzero()[:, 0])[:keep]


def _chain(*parts: Tensor) -> Tensor:
    """One after the other, each index only the first time."""
    return torch.tensor(list(dict.fromkeys(i for part in parts for i in part.tolist())), dtype=torch.long)


def contrast(rewards: Tensor, group: Tensor, groups: int) -> Tensor:
    """``[B]``: population standard deviation of each group's rewards (``[N]``), NaN left out; 0 for an empty group."""
    valid = ~torch.isnan(rewards)
    count = torch.bincount(group[valid], minlength=groups).clamp(min=1)
    zeros = torch.zeros(groups, dtype=torch.float64, device=rewards.device)
    values = rewards[valid].double()
    mean = zeros.index_add(0, group[valid], values) / count
    return (zeros.index_add(0, group[valid], (values - mean[group[valid]]).square()) / count).sqrt()
