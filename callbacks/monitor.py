# SPDX-License-Identifier: Apache-2.0
"""Watch a logged value."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn


class Monitor:
    """Reads one value from the metrics of each step, and says so once if it never appears.

    Args:
        name: of the logged value.
        owner: who watches, for the warning.
        patience: steps without the value, from the start on, before the warning.
    """

    def __init__(self, name: str, owner: str, patience: int = 10) -> None:
        self.name, self.owner, self.patience = name, owner, patience
        self._missed: int | None = 0  # None: it has been seen

    def read(self, metrics: Mapping[str, float]) -> float:
        """The step's value; NaN if the step did not measure it."""
        if self.name in metrics:
            self._missed = None
            return float(metrics[self.name])
        if self._missed is not None:
            self._missed += 1
            if self._missed == self.patience:
                rank_zero_warn(
                    f"{self.owner} watches {self.name!r}, which no step has logged so far. Logged are: "
                    f"{', '.join(sorted(metrics))}."
                )
        return math.nan
