# SPDX-License-Identifier: Apache-2.0
"""Predictions as files: one line a completion, with its scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_rl.rollouts import Rollouts
from lit_rl.storage import plain_value


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns to ``<folder>/<evaluation set>.jsonl``, batch by batch.

    With several ranks each writes a file of its own, ``<evaluation set>-rank<rank>.jsonl``; the field ``index`` says
    where a prompt stands in its set. Files appear under their names when they are complete.

    Args:
        folder: where to; default ``predictions`` in the run's directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.paths: list[Path] = []
        self._files: dict[Path, IO[str]] = {}

    def path(self, trainer: Trainer, module: Any, name: str) -> Path:
        """The file of one evaluation set on this rank."""
        folder = Path(self.folder) if self.folder else Path(module.run_dir) / "predictions"
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        return folder / f"{name}{rank}.jsonl"

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start all files afresh, so that a set without prompts on this rank has an empty one."""
        self.paths = [self.path(trainer, pl_module, s.name) for s in pl_module.data.eval_sets]
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[path] = open(_partial(path), "w", encoding="utf-8")  # noqa: SIM115  (closed at the end)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of one batch."""
        file = self._files[self.paths[dataloader_idx]]
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the files their names."""
        for path in self.paths:
            self._files.pop(path).close()
            os.replace(_partial(path), path)
        rank_zero_info("Predictions: " + ", ".join(str(p) for p in self.paths))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no half file under a good name."""
        for path, file in self._files.items():
            file.close()
            _partial(path).unlink(missing_ok=True)
        self._files = {}


def prediction_rows(rollouts: Rollouts, texts: list[str]) -> list[dict[str, Any]]:
    """One dictionary of plain values a completion; what is not scorable is None.

    Keys: ``index`` (of the prompt in its evaluation set), ``sample`` (of the completion among those of the prompt),
    ``source``, ``prompt``, ``completion``, ``reward``, ``correct``, ``rewards`` (raw terms by name), ``tokens``,
    ``finished``, and ``columns``, the other columns of the dataset.
    """
    rewards, terms = rollouts.rewards.tolist(), {k: v.tolist() for k, v in rollouts.reward_terms.items()}
    row = {k: rollouts.row[k].tolist() for k in ("sample", "correct", "lengths", "finished")}
    prompts, draws = rollouts.prompts, rollouts.prompts.draw.tolist()
    return [
        {
            "index": draws[g],
            "sample": row["sample"][i],
            "source": prompts.source[g],
            "prompt": prompts.text[g],
            "completion": texts[i],
            "reward": plain_value(rewards[i]),
            "correct": plain_value(row["correct"][i]),
            "rewards": {name: plain_value(values[i]) for name, values in terms.items()},
            "tokens": row["lengths"][i],
            "finished": row["finished"][i],
            "columns": {name: values[g] for name, values in prompts.columns.items()},
        }
        for i, g in enumerate(rollouts.group.tolist())
    ]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
