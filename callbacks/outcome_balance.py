# SPDX-License-Identifier: Apache-2.0
"""Online balancing of Uni-OPD: as many right completions as wrong ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.noise import row_keys, uniforms


def surplus(right: int, wrong: int, ratio: float) -> tuple[int, int]:
    """How many right and wrong completions to drop for a target ratio right : wrong.

    >>> surplus(12, 4, 1.0), surplus(3, 13, 1.0), surplus(3, 13, 2.0), surplus(16, 0, 1.0)
    ((8, 0), (0, 10), (0, 12), (0, 0))
    """
    if ratio == 0:
        return right, 0
    if math.isinf(ratio):
        return 0, wrong
    if not right or not wrong:
        return 0, 0
    keep_right, keep_wrong = math.floor(wrong * ratio), math.floor(right / ratio)
    if right > keep_right >= 1:
        return right - keep_right, 0
    if wrong > keep_wrong >= 1:
        return 0, wrong - keep_wrong
    return 0, 0


class UniOPDBalance(RolloutCallback):
    """Uni-OPD (arXiv 2605.03677): drop random completions until right and wrong ones stand in a target ratio.

    Which ones is a hash of (seed, draw, sample), so the choice repeats and does not depend on the ranks. A completion
    without a verdict counts as wrong, as in the released code; a group with one kind only is left alone.

    Args:
        ratio: right : wrong. 0 drops all right completions, infinity all wrong ones.
        scope: balance each prompt's completions (``"sample"``), or those of the batch on all ranks (``"global"``).
        keep_for_margin: only silence the completions, so that `MarginCalibration` still counts them (the released
            trainer does; the paper does not say). By default they are gone.
    """

    requires = frozenset({"correct"})

    def __init__(
        self, ratio: float = 1.0, scope: Literal["sample", "global"] = "sample", keep_for_margin: bool = False
    ) -> None:
        if not ratio >= 0:
            raise ValueError(f"ratio of right to wrong completions must be at least 0, got {ratio}.")
        if scope not in ("sample", "global"):
            raise ValueError(f"scope must be 'sample' or 'global', got {scope!r}.")
        self.ratio, self.scope, self.keep_for_margin = ratio, scope, keep_for_margin

    def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Drop or silence what is too much."""
        right = rollouts.correct == 1
        draws = rollouts.prompts.draw.to(rollouts.device)[rollouts.group]
        keys = row_keys(module.seed + 2, draws, rollouts.row["sample"])
        noise = uniforms(keys, torch.zeros_like(keys))
        if self.scope == "global":
            everywhere, mine = ranks.all_gather_concat(torch.stack([right.double(), noise], 1))
            dropped = self.drop(everywhere[:, 0] == 1, everywhere[:, 1])[mine]
        else:
            dropped = torch.zeros_like(right)
            for g in range(len(rollouts.prompts)):
                rows = (rollouts.group == g).nonzero()[:, 0]
                dropped[rows] = self.drop(right[rows], noise[rows])
        module.ledger.total("uni_opd/dropped_right", (dropped & right).sum())
        module.ledger.total("uni_opd/dropped_wrong", (dropped & ~right).sum())
        module.ledger.mean("uni_opd/right_ratio", right.float(), ~dropped)
        if not dropped.any():
            return None
        if self.keep_for_margin:
            rollouts.loss_weights = torch.where(dropped[:, None], 0.0, rollouts.loss_weights)
            return None
        return rollouts.select(~dropped)

    def drop(self, right: Tensor, noise: Tensor) -> Tensor:
        """Which of these completions go: in the class with a surplus, those of smallest noise."""
        dropped = torch.zeros_like(right)
        numbers = surplus(int(right.sum()), int((~right).sum()), self.ratio)
        for members, number in ((right, numbers[0]), (~right, numbers[1])):
            rows = members.nonzero()[:, 0]
            dropped[rows[noise[rows].argsort()[:number]]] = True
        return dropped
