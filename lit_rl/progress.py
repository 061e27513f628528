# SPDX-License-Identifier: Apache-2.0
"""A progress bar over rollout steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class RolloutProgressBar(TQDMProgressBar):
    """Shows rollout steps out of ``max_rollouts`` with reward, pass@1, completion length and tokens a second."""

    names = {
        "reward/mean": "reward",
        "val/pass@1": "pass@1",
        "rollout/length_mean": "length",
        "speed/tokens_per_second": "tokens/s",
    }

    @property
    def total_train_batches(self) -> int | float:
        """The length of the run."""
        module: Any = self.trainer.lightning_module
        return getattr(module, "max_rollouts", super().total_train_batches)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """The run is one endless epoch to Lightning, which nobody needs to know."""
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description("step")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        shown: dict[str, Any] = {}
        for name, short in self.names.items():
            if name in metrics:
                value: Any = metrics[name]
                shown[short] = f"{float(value):.0f}" if short == "tokens/s" else f"{float(value):.3g}"
        return shown
