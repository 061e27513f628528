# SPDX-License-Identifier: Apache-2.0
"""A ring of training states on disk, and going back to one of them: the seam of everything that rewinds a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_rl import distributed as ranks
from lit_rl.checkpoint import RolloutCheckpoint, file_name
from lit_rl.hooks import RolloutCallback, callbacks_with
from lit_rl.methods.placement import is_sharded
from lit_rl.storage import write_atomically

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule


class StateRing:
    """Training states by rollout step, bounded in number and bytes, in the hands of a callback that rewinds.

    Files are written atomically, one for each rank, and never change: their names hold both clocks. A file that leaves
    the ring is deleted at once, unless a checkpoint that `RolloutCheckpoint` keeps refers to it; then it stays until
    that checkpoint is gone, because a run that is resumed from there may need it.

    The owner calls `open` in ``on_train_start``, `refer` in ``on_save_checkpoint``, and keeps `state_dict` in its own.

    Args:
        max_entries: how many states to keep.
        max_bytes: how many bytes the states of one rank may take together; None: no bound. One state is always kept.
    """

    def __init__(self, max_entries: int, max_bytes: int | None = None) -> None:
        if max_entries < 1:
            raise ValueError(f"A ring must hold at least one state, got max_entries={max_entries}.")
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.files: dict[int, str] = {}
        self._folder: Path | None = None
        self._checkpoints: list[Path] = []  # folders
        self._references: dict[int, set[str]] = {}  # clock of a checkpoint -> files that it refers to

    def open(self, module: RLModule, name: str) -> None:
        """Use the folder ``name`` of the run's directory.

        States that a resumed run knows of but that are no longer on disk are left out, with a warning.
        """
        self._folder = module.run_dir / name
        savers = [c for c in module.trainer.callbacks if isinstance(c, RolloutCheckpoint)]  # type: ignore[attr-defined]
        self._checkpoints = [saver.directory(module) for saver in savers]
        if self._reference_file().exists():
            stored = json.loads(self._reference_file().read_text())
            self._references = {int(clock): set(files) for clock, files in stored.items()}
        self._references[module.clock] = set(self.files.values())  # of the checkpoint that was resumed
        missing = [step for step, file in self.files.items() if not self._path(file).exists()]
        if missing:
            rank_zero_warn(
                f"The run cannot go back to the rollout steps {missing}: their states are no longer in {self._folder}. "
                "They stay there for as long as RolloutCheckpoint keeps the checkpoint that refers to them."
            )
            self.files = {step: file for step, file in self.files.items() if step not in missing}

    def _reference_file(self) -> Path:
        return self._path(f"references-rank{ranks.rank()}.json")

    def _path(self, file: str) -> Path:
        if self._folder is None:
            raise RuntimeError("StateRing.open(module, name) must be called first.")
        return self._folder / file

    def steps(self) -> list[int]:
        """Rollout steps that can be gone back to, oldest first."""
        return sorted(self.files)

    def save(self, module: RLModule) -> None:
        """Keep the module's training state at its present rollout step, then let go of what is too much."""
        file = f"step{module.rollout_step:08d}-clock{module.clock:08d}-rank{ranks.rank()}.pt"
        state = module.training_state()
        write_atomically(self._path(file), lambda f: torch.save(state, f))
        self.files[module.rollout_step] = file
        while len(self.files) > self.max_entries or (len(self.files) > 1 and self._too_large(module.device)):
            del self.files[self.steps()[0]]
        self._prune()

    def _too_large(self, device: torch.device) -> bool:
        if self.max_bytes is None:
            return False
        size = sum(self._path(file).stat().st_size for file in self.files.values())
        return bool(ranks.all_max(torch.tensor(int(size > self.max_bytes), device=device)))

    def load(self, step: int) -> dict[str, Any]:
        """The training state at a rollout step; tensors are read from disk when they are used.

        Raises:
            FileNotFoundError: naming the steps that are there.
        """
        if step not in self.files:
            raise FileNotFoundError(f"There is no saved state of rollout step {step}, only of {self.steps()}.")
        return torch.load(self._path(self.files[step]), map_location="cpu", weights_only=True, mmap=True)

    def forget_after(self, step: int) -> None:
        """Let go of states later than ``step``: they belong to an abandoned future."""
        self.files = {s: file for s, file in self.files.items() if s <= step}
        self._prune()

    def refer(self, module: RLModule) -> None:
        """A checkpoint that refers to the present states is being written."""
        self._references[module.clock] = set(self.files.values())
        self._prune()
        stored = json.dumps({clock: sorted(files) for clock, files in self._references.items()})
        write_atomically(self._reference_file(), lambda f: f.write(stored.encode()))

    def _prune(self) -> None:
        """Delete files of this rank that neither the ring nor a kept checkpoint refers to."""
        newest = max(self._references, default=None)  # perhaps half written
        self._references = {
            clock: files
            for clock, files in self._references.items()
            if clock == newest or any((folder / file_name(clock)).exists() for folder in self._checkpoints)
        }
        needed = set(self.files.values()).union(*self._references.values())
        for path in self._path("").glob(f"step*-rank{ranks.rank()}.pt"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Which files belong to the ring."""
        return {"files": dict(self.files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refer to the files of a resumed run again, each rank to its own (checkpoints hold the state of rank 0)."""
        own = f"-rank{ranks.rank()}.pt"
        self.files = {step: file.rsplit("-rank", 1)[0] + own for step, file in state["files"].items()}


def rewind(module: RLModule, ring: StateRing, step: int) -> None:
    """Go back to a saved rollout step; call it from ``on_train_batch_end``. The clock goes on forward.

    Callbacks with ``rewinds = True`` get their state of that step back; the others are told through ``on_rewind``.
    """
    module.load_training_state(ring.load(step))
    for callback in callbacks_with(module.trainer, "on_rewind"):
        callback.on_rewind(module.trainer, module, step)


def check_rewinder(owner: RolloutCallback, module: RLModule) -> None:
    """Refuse what would make a rewound run differ; for ``check_setup`` of a callback that rewinds.

    Raises:
        ValueError: the sampler carries work over from step to step, or a callback further down the list still changes
            its state after this one has saved or restored it.
    """
    name = type(owner).__name__
    if is_sharded(module):
        raise ValueError(
            f"{name} rewinds the run, which needs whole weights on every rank and these are sharded: use ddp."
        )
    if module.sampler.carries_over:
        raise ValueError(
            f"{name} rewinds the run, but {type(module.sampler).__name__} carries completions over from step to step: "
            "they would come from the abandoned future. Use a sampler that finishes every batch, such as HFSampler."
        )
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    for later in callbacks[callbacks.index(owner) + 1 :]:
        acts = type(later).on_train_batch_end is not RolloutCallback.on_train_batch_end
        if isinstance(later, RolloutCallback) and later.rewinds and acts:
            raise ValueError(
                f"{name} saves and restores the state of other callbacks in on_train_batch_end, but "
                f"{type(later).__name__} comes after it and acts there too: list {type(later).__name__} first, or let "
                "it use on_metrics."
            )


@contextmanager
def weights_of(module: RLModule, ring: StateRing, step: int) -> Iterator[None]:
    """Inside, the module has the weights of an earlier rollout step; afterwards its own again."""
    parameters = dict(module.named_parameters())
    earlier = ring.load(step)["weights"]
    own = {name: parameters[name].detach().clone() for name in earlier}
    try:
        _set(parameters, earlier)
        yield
    finally:
        _set(parameters, own)


@torch.no_grad()
def _set(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
