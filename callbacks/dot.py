# SPDX-License-Identifier: Apache-2.0
"""Dynamic Outlier Truncation: cut the longest completions of groups that are solved anyway."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts


class DynamicOutlierTruncation(RolloutCallback):
    r"""DOT (arXiv 2601.03969): in groups where every completion is correct, cut the extreme right tail of the lengths.

    For a group with success rate at least ``min_success`` and lengths :math:`L_i`, the cutoff is
    :math:`T = \lfloor \mathrm{mean}(L) + \alpha\,\mathrm{std}(L) \rfloor` (sample standard deviation). A completion
    with :math:`L_i - T \ge m` is cut to T tokens and scored again; it usually loses its answer, so a group that taught
    nothing now pushes down its outlier, and nothing else. Token ids stay; only lengths and loss weights change.

    List it before whatever drops groups without reward variance, or its groups are gone.

    Args:
        alpha: multiple of the standard deviation; infinity never cuts.
        min_margin: m, the least number of tokens a cut must remove; below 1 a fraction of the length (at least 16).
        min_success: share of correct completions from which a group counts as solved.
    """

    requires = frozenset({"correct"})

    def __init__(self, alpha: float = 3.0, min_margin: float = 32, min_success: float = 1.0) -> None:
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}: it counts standard deviations above the mean.")
        if min_margin <= 0:
            raise ValueError(f"min_margin must be positive, got {min_margin}.")
        if not 0 < min_success <= 1:
            raise ValueError(f"min_success must be in (0, 1], got {min_success}.")
        self.alpha, self.min_margin, self.min_success = alpha, min_margin, min_success

    def check_setup(self, module: Any) -> None:
        """Refuse a group size at which no length can lie alpha standard deviations above the mean."""
        size = module.group_size
        largest = (size - 1) / math.sqrt(size)
        if math.isfinite(self.alpha) and self.alpha >= largest:
            raise ValueError(
                f"DynamicOutlierTruncation(alpha={self.alpha}) can never fire with group_size={size}: the largest "
                f"possible z-score in such a group is {largest:.3f}. Use an alpha below that, or a larger group."
            )

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Cut, score the cut completions again, and log what happened."""
        solved, cutoff = self.cutoffs(rollouts)
        lengths = rollouts.lengths
        above = solved[rollouts.group] & (lengths > cutoff[rollouts.group])
        cut = above & (lengths - cutoff[rollouts.group] >= self.margins(lengths))
        rows = cut.nonzero()[:, 0]
        removed = (lengths - cutoff[rollouts.group])[rows].sum()
        was_correct = rollouts.correct[rows]
        rollouts.truncate(rows, cutoff[rollouts.group][rows])
        module.rescore(rollouts, rows)
        ledger = module.ledger
        ledger.mean("dot/all_correct_ratio", solved.float())
        ledger.mean("dot/truncated", cut.float())
        ledger.mean("dot/skipped_by_margin", (above & ~cut).float())
        ledger.total("dot/tokens_cut", removed)
        ledger.mean("dot/broken_answer_ratio", (rollouts.correct[rows] < was_correct).float())
        ledger.mean("dot/avg_cutoff", cutoff.float(), solved)

    def cutoffs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """``[B]`` bool, which groups are solved, and ``[B]`` int, their cutoff lengths in tokens."""
        sizes = rollouts.group_sizes().double()
        right = torch.nan_to_num((rollouts.correct - 1).abs(), nan=1.0) < 1e-6
        success = rollouts.group_mean(right.double())
        lengths = rollouts.lengths.double()
        mean = rollouts.group_mean(lengths)
        square = torch.zeros_like(mean).index_add(0, rollouts.group, (lengths - mean[rollouts.group]).square())
        std = torch.where(sizes > 1, (square / (sizes - 1).clamp(min=1)).sqrt(), 0.0)
        limit = mean + (self.alpha * std if math.isfinite(self.alpha) else math.inf)
        ceiling = float(rollouts.width + 1)
        return success >= self.min_success, limit.clamp(max=ceiling).floor().long()

    def margins(self, lengths: Tensor) -> Tensor:
        """``[N]``: the least number of tokens that a cut of each row must remove."""
        if self.min_margin >= 1:
            return torch.full_like(lengths, math.ceil(self.min_margin))
        return (self.min_margin * lengths).long().clamp(min=16)
