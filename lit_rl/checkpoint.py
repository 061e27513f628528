# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive: written beside, flushed, renamed, with a checksum; the last good one is always there."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rl.distributed import all_max
from lit_rl.requeue import requeue, requeue_signal
from lit_rl.storage import write_atomically

SUFFIX = ".ckpt"


class _HashedFile:
    """A binary file that knows the SHA-256 of what was written to it, so that nothing is held in memory for it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes in the target's own folder, syncs, renames, and puts a SHA-256 beside the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local path so that a crash leaves the old file or the new one, never a part.

        Raises:
            OSError: with a sentence, if the file cannot be written; what was there before is untouched.
        """
        target, digests = Path(path), []

        def write(file: IO[bytes]) -> None:
            hashed = _HashedFile(file)
            torch.save(checkpoint, hashed)  # type: ignore[arg-type]
            digests.append(hashed.sha256.hexdigest())

        try:
            write_atomically(target, write)
            write_atomically(digest_path(target), lambda f: f.write(digests[0].encode()))
        except (OSError, RuntimeError) as error:  # torch may wrap the reason: "failed writing file"
            reason = error.strerror if isinstance(error, OSError) else None
            raise OSError(
                f"Could not write the checkpoint {target}: {reason or error}. The previous checkpoint is "
                "untouched. Free space or choose another --trainer.default_root_dir, then resume from it."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values (nothing is executed), after comparing the checksum if there is one.

        Raises:
            ValueError: if the file is damaged.
        """
        if digest_path(Path(path)).exists() and not is_intact(Path(path)):
            raise ValueError(
                f"The checkpoint {path} is damaged (its checksum differs). Resume from an earlier one: "
                "--ckpt_path last finds the newest that is intact."
            )
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        digest_path(Path(path)).unlink(missing_ok=True)


def digest_path(path: Path) -> Path:
    """Where the checksum of a checkpoint is kept."""
    return path.with_name(path.name + ".sha256")


def is_intact(path: Path) -> bool:
    """Whether a checkpoint file matches the checksum beside it."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return found == digest_path(path).read_text().strip()
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
    """Saves between two steps, by count or by time, and stops cleanly on signals.

    A checkpoint is written when everything about the last step is decided, logged and flushed, validation included, and
    before anything of the next one has begun: a resumed run repeats nothing and misses nothing.

    Ctrl-C (SIGINT) and SIGTERM stop generation at the next token; the interrupted step is thrown away, because it
    will be drawn again, and the state before it is saved. The process then exits with status 130 or 143. A second
    Ctrl-C aborts at once and leaves the last good file. In a SLURM job that Lightning would requeue, its signal stops
    the run in the same way, and the job is queued again after the save.

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
        self._requeue_signal: int | None = None

    def directory(self, module: LightningModule) -> Path:
        """Where the checkpoints of this run are."""
        return Path(self.folder) if self.folder else Path(module.run_dir) / "checkpoints"  # type: ignore[arg-type]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.received, self._last_time, self._last_clock = None, time.monotonic(), pl_module.clock  # type: ignore
        # Fail now, not after an hour: the directory must be writable.
        folder = self.directory(pl_module)
        if trainer.is_global_zero:
            try:
                write_atomically(folder / ".writable", lambda f: f.write(b""))
                (folder / ".writable").unlink()
                for partial in folder.glob(".*.partial"):  # left by a run that was killed while it wrote
                    partial.unlink()
            except OSError as error:
                raise OSError(
                    f"Checkpoints cannot be written to {folder}: {error.strerror or error}. "
                    "Choose another --trainer.default_root_dir or --checkpoint.folder."
                ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning installs a handler of its own for SIGTERM, which would end the run without a save.
        if threading.current_thread() is threading.main_thread():
            self._requeue_signal = requeue_signal(trainer)
            numbers = (signal.SIGINT, signal.SIGTERM, self._requeue_signal)
            for number in (n for n in numbers if n is not None):
                signal.signal(number, self._on_signal)  # Lightning restores all handlers when the run ends

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)
        self.received = number

    def stop_requested(self) -> bool:
        """Whether a signal asked the run to stop (samplers look at this after every token)."""
        return self.received is not None

    def on_step_boundary(self, trainer: Trainer, module: Any) -> None:
        """Save if it is time, or if a signal came to any rank; then stop."""
        overdue = self.every_n_minutes is not None and time.monotonic() - self._last_time > 60 * self.every_n_minutes
        mine = torch.tensor([self.received or 0, int(overdue and trainer.is_global_zero)], device=module.device)
        received, late = all_max(mine).tolist()
        if received or late or module.rollout_step % self.every_n_rollouts == 0:
            self.save(trainer, module)
        if received:
            self.received = int(received)
            trainer.should_stop = True

    def save(self, trainer: Trainer, module: Any) -> None:
        """Write one checkpoint (a collective call) and then remove those that are too many."""
        module.undo_interrupted_step()
        if module.clock == self._last_clock:
            return
        for logger in trainer.loggers:  # what was logged before a checkpoint must not be lost after it
            flush = getattr(getattr(logger, "experiment", None), "flush", None)
            if flush is not None:
                flush()
        folder = self.directory(module)
        trainer.save_checkpoint(folder / file_name(module.clock), weights_only=False)
        self._last_time, self._last_clock = time.monotonic(), module.clock
        if trainer.is_global_zero:
            names = sorted(path.name for path in folder.glob(f"clock*{SUFFIX}"))
            past = [name for name in names if name <= file_name(module.clock)]
            for name in set(names) - set(past[-self.keep :]):  # also those of a future that was abandoned
                trainer.strategy.remove_checkpoint(folder / name)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.received is not None and stage == "fit":
            rank_zero_info(f"Stopped by signal {self.received}; resume with --ckpt_path last.")
            if self.received == self._requeue_signal and trainer.is_global_zero:
                requeue()


def file_name(clock: int) -> str:
    """Name of the checkpoint that is written at a clock; names sort as clocks do."""
    return f"clock{clock:08d}{SUFFIX}"
