# SPDX-License-Identifier: Apache-2.0
"""Dynamic Outlier Truncation: cut the longest completions of groups that are solved anyway."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_rl.callbacks.signal import require_all_groups, verdicts
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts


class DynamicOutlierTruncation(RolloutCallback):
    r"""DOT (arXiv 2601.03969): in groups where every completion is correct, cut the extreme right tail of the lengths.

    For a group with success rate at least ``min_success`` and lengths :math:`L_i`, the cutoff is
    :math:`T = \lfloor \mathrm{mean}(L) + \alpha\,\mathrm{std}(L) \rfloor` (sample standard deviation). A completion
    with :math:`L_i - T \ge m` is cut to T tokens and scored again; it usually loses its answer, so a group that taught
    nothing pushes down its outlier, and nothing else. Token ids stay; only lengths and loss weights change.

    Logged: ``dot/all_correct_ratio`` (share of groups that count as solved), ``dot/truncated`` and
    ``dot/skipped_by_margin`` (shares of completions), ``dot/tokens_cut`` (their number), ``dot/broken_answer_ratio``
    (share of the cut completions that lost their answer), ``dot/avg_cutoff`` (mean T of the solved groups, in tokens).

    Args:
        alpha: multiple of the standard deviation; infinity never cuts. In a group of G completions none lies more than
            (G − 1)/√G standard deviations above the mean, so a larger alpha is refused: 3 needs G ≥ 11.
        min_margin: m, the least number of tokens that a cut must remove; below 1 a share of the length (but at least
            16 tokens).
        min_success: share of correct completions from which a group counts as solved.

    The defaults are the paper's (G = 32).
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
        """Refuse an alpha that no completion can reach, and a list in which solved groups are dropped before."""
        require_all_groups(self, "on_rewards", module)
        size = module.group_size
        largest = (size - 1) / math.sqrt(size)
        if math.isfinite(self.alpha) and self.alpha >= largest:
            raise ValueError(
                f"DynamicOutlierTruncation(alpha={self.alpha}) can never fire with group_size={size}: no completion is "
                f"more than {largest:.3f} standard deviations longer than the mean of such a group. Use an alpha below "
                "that, or a larger group."
            )

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Cut, score the cut completions again, and log what happened."""
        solved, cutoff = self.cutoffs(rollouts)  # [B]
        lengths, ends = rollouts.lengths, cutoff[rollouts.group]  # [N]
        above = solved[rollouts.group] & (lengths > ends)
        cut = above & (lengths - ends >= self.margins(lengths))
        rows = cut.nonzero()[:, 0]
        before = rollouts.correct[rows]
        rollouts.truncate(rows, ends[rows])
        module.rescore(rollouts, rows)
        ledger = module.ledger
        ledger.mean("dot/all_correct_ratio", solved.float(), rollouts.group_mean(rollouts.sampled.float()) > 0)
        ledger.mean("dot/truncated", cut.float(), rollouts.sampled)
        ledger.mean("dot/skipped_by_margin", (above & ~cut).float(), rollouts.sampled)
        ledger.total("dot/tokens_cut", (lengths - ends)[rows].sum())
        ledger.mean("dot/broken_answer_ratio", (rollouts.correct[rows] < before).float())
        ledger.mean("dot/avg_cutoff", cutoff.float(), solved)

    def cutoffs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """``[B]`` bool, which groups are solved, and ``[B]`` int, their cutoff lengths in tokens."""
        sizes = rollouts.group_sizes().double()
        right = (torch.nan_to_num(verdicts(rollouts), nan=0.0) - 1).abs() < 1e-6
        lengths = rollouts.lengths.double()
        mean = rollouts.group_mean(lengths)
        square = torch.zeros_like(mean).index_add(0, rollouts.group, (lengths - mean[rollouts.group]).square())
        std = (square / (sizes - 1).clamp(min=1)).sqrt()
        limit = mean + self.alpha * std if math.isfinite(self.alpha) else torch.full_like(mean, math.inf)
        unreachable = float(rollouts.width + 1)
        solved = rollouts.group_mean(right.double()) >= self.min_success
        return solved, limit.clamp(max=unreachable).floor().long()

    def margins(self, lengths: Tensor) -> Tensor:
        """``[N]``: the least number of tokens that a cut of each row must remove."""
        if self.min_margin >= 1:
            return torch.full_like(lengths, math.ceil(self.min_margin))
        return (self.min_margin * lengths).long().clamp(min=16)
