# SPDX-License-Identifier: Apache-2.0
"""A ring of training states on disk, and going back to one of them: the seam of everything that rewinds a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_rl import distributed as ranks
from lit_rl.storage import write_atomically

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule

KEPT_CHECKPOINTS = 3  # a run keeps two checkpoints; a third may be half written


class StateRing:
    """Training states by rollout step, bounded in number and bytes.

    Files are written atomically, one for each rank, and never overwritten: their names hold the clock. A file that
    leaves the ring is deleted only when no kept checkpoint refers to it any more, so that resuming from an older
    checkpoint finds what it had.

    Args:
        folder: where the files are.
        max_entries: how many states to keep.
        max_bytes: how many bytes all states may take together; None: no bound.
    """

    def __init__(self, folder: Path, max_entries: int, max_bytes: int | None = None) -> None:
        self.folder, self.max_entries, self.max_bytes = folder, max_entries, max_bytes
        self.files: dict[int, str] = {}
        self._referenced: deque[set[str]] = deque(maxlen=KEPT_CHECKPOINTS)

    def steps(self) -> list[int]:
        """Rollout steps that can be gone back to, oldest first."""
        return sorted(self.files)

    def save(self, module: RLModule) -> None:
        """Keep the module's training state at its present rollout step, then let go of what is too much."""
        name = f"step{module.rollout_step:08d}-clock{module.clock:08d}-rank{ranks.rank()}.pt"
        state = module.training_state()
        write_atomically(self.folder / name, lambda f: torch.save(state, f))
        self.files[module.rollout_step] = name
        while len(self.files) > self.max_entries or (self._too_large() and len(self.files) > 1):
            del self.files[self.steps()[0]]

    def _too_large(self) -> bool:
        if self.max_bytes is None:
            return False
        return sum((self.folder / f).stat().st_size for f in self.files.values()) > self.max_bytes

    def load(self, step: int) -> dict[str, Any]:
        """The training state at a rollout step.

        Raises:
            FileNotFoundError: naming the steps that are there.
        """
        if step not in self.files:
            raise FileNotFoundError(f"There is no saved state of rollout step {step} in {self.folder}: {self.steps()}.")
        return torch.load(self.folder / self.files[step], map_location="cpu", weights_only=True)

    def forget_after(self, step: int) -> None:
        """Let go of states later than ``step``: they belong to an abandoned future."""
        self.files = {s: f for s, f in self.files.items() if s <= step}

    def on_checkpoint(self) -> None:
        """A checkpoint that refers to the present states is being written: delete what nothing refers to."""
        self._referenced.append(set(self.files.values()))
        needed = set().union(*self._referenced)
        for path in self.folder.glob(f"step*-rank{ranks.rank()}.pt"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Which files belong to the ring."""
        return {"files": dict(self.files), "referenced": [sorted(r) for r in self._referenced]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refer to the files of a resumed run again."""
        self.files = dict(state["files"])
        self._referenced = deque((set(r) for r in state["referenced"]), maxlen=KEPT_CHECKPOINTS)


def rewind(module: RLModule, ring: StateRing, step: int) -> int:
    """Go back to a saved rollout step (call it between steps). The clock goes on forward.

    Args:
        module: the method.
        ring: where states are kept.
        step: the rollout step to go back to.

    Returns:
        How many rollout steps the run went back.
    """
    distance = module.rollout_step - step
    module.load_training_state(ring.load(step))
    ring.forget_after(step)
    return distance


@contextmanager
def weights_of(module: RLModule, ring: StateRing, step: int) -> Iterator[None]:
    """Inside, the policy has the weights of an earlier rollout step; afterwards its own again."""
    parameters = dict(module.model.named_parameters())
    earlier = ring.load(step)["model"]
    own = {name: parameters[name].detach().clone() for name in earlier}
    try:
        with torch.no_grad():
            for name, value in earlier.items():
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)
