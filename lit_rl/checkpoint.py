# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive: written beside, flushed, renamed, with a checksum; the last good one is always there."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rl.distributed import broadcast_object
from lit_rl.storage import write_atomically

SUFFIX = ".ckpt"


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes in the target's own folder, syncs, renames, and puts a SHA-256 beside the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local path so that a crash leaves the old file or the new one, never a part."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        blob = buffer.getbuffer()
        target = Path(path)
        try:
            write_atomically(target, lambda f: f.write(blob))
            digest = hashlib.sha256(blob).hexdigest()
            write_atomically(digest_path(target), lambda f: f.write(digest.encode()))
        except OSError as error:
            raise OSError(
                f"Could not write the checkpoint {target}: {error.strerror or error}. The previous checkpoint is "
                "untouched. Free space or choose another --trainer.default_root_dir, then resume from it."
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        digest_path(Path(path)).unlink(missing_ok=True)


def digest_path(path: Path) -> Path:
    """Where the checksum of a checkpoint is kept."""
    return path.with_name(path.name + ".sha256")


def is_intact(path: Path) -> bool:
    """Whether a checkpoint file matches the checksum beside it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest_path(path).read_text().strip()
    except OSError:
        return False


def last_good_checkpoint(folder: Path | str) -> Path | None:
    """The newest intact checkpoint below a folder; damaged ones are skipped with a warning.

    Args:
        folder: a run's directory, or one that holds several runs.
    """
    found = sorted(Path(folder).rglob(f"clock*{SUFFIX}"), key=lambda p: (p.stat().st_mtime, p.name), reverse=True)
    for path in found:
        if is_intact(path):
            return path
        rank_zero_warn(f"The checkpoint {path} is damaged (its checksum differs): going back to the one before it.")
    return None


class RolloutCheckpoint(Checkpoint):
    """Saves at rollout boundaries, by count or by time, and stops cleanly on signals.

    Lightning runs checkpoint callbacks last, so a state that is saved holds what every other callback decided.

    Ctrl-C (SIGINT) and SIGTERM stop generation at the next token; the interrupted step is thrown away, because it
    will be drawn again, and the state before it is saved. The process then exits with status 130 or 143. A second
    Ctrl-C aborts at once and leaves the last good file.

    Args:
        every_n_rollouts: save when ``rollout_step`` is a multiple of this.
        every_n_minutes: also save when this much time has passed; None: by count only.
        keep: how many checkpoints to keep; an older one is deleted only after a newer one is durable.
        folder: where; default ``checkpoints`` in the run's directory.
    """

    def __init__(
        self,
        every_n_rollouts: int = 50,
        every_n_minutes: float | None = None,
        keep: int = 2,
        folder: str | None = None,
    ) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"every_n_rollouts must be at least 1, got {every_n_rollouts}.")
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}: if the last file is damaged, one must remain.")
        self.every_n_rollouts, self.every_n_minutes, self.keep = every_n_rollouts, every_n_minutes, keep
        self.folder = folder
        self.received: int | None = None
        self._last_time = time.monotonic()
        self._last_clock = -1
        self._handlers: dict[int, Any] = {}

    def directory(self, trainer: Trainer, module: LightningModule) -> Path:
        """Where the checkpoints of this run are."""
        return Path(self.folder) if self.folder else Path(module.run_dir) / "checkpoints"  # type: ignore[arg-type]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Fail now, not after an hour: the directory must be writable.
        folder = self.directory(trainer, pl_module)
        if trainer.is_global_zero:
            try:
                write_atomically(folder / ".writable", lambda f: f.write(b""))
                (folder / ".writable").unlink()
            except OSError as error:
                raise OSError(
                    f"Checkpoints cannot be written to {folder}: {error.strerror or error}. "
                    "Choose another --trainer.default_root_dir or --checkpoint.folder."
                ) from error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)
        self.received = number

    def stop_requested(self) -> bool:
        """Whether a signal asked the run to stop (samplers look at this after every token)."""
        return self.received is not None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        received = broadcast_object(self.received)
        due = pl_module.rollout_step % self.every_n_rollouts == 0
        if self.every_n_minutes is not None:
            due = due or bool(broadcast_object(time.monotonic() - self._last_time > 60 * self.every_n_minutes))
        if received is not None or due:
            self.save(trainer, pl_module)
        if received is not None:
            self.received = int(str(received))
            trainer.should_stop = True

    def save(self, trainer: Trainer, module: Any) -> None:
        """Write one checkpoint (a collective call) and then remove those that are too many."""
        if module.clock == self._last_clock:
            return
        for logger in trainer.loggers:  # what was logged before a checkpoint must not be lost after it
            flush = getattr(getattr(logger, "experiment", None), "flush", None)
            if flush is not None:
                flush()
        folder = self.directory(trainer, module)
        trainer.save_checkpoint(folder / f"clock{module.clock:08d}{SUFFIX}")
        self._last_time, self._last_clock = time.monotonic(), module.clock
        if trainer.is_global_zero:
            old = sorted(folder.glob(f"clock*{SUFFIX}"))[: -self.keep]
            for path in old:
                trainer.strategy.remove_checkpoint(path)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.received is None:
            self.save(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if self.received is not None and stage == "fit":
            rank_zero_info(f"Stopped by signal {self.received}; resume with --ckpt_path last.")
