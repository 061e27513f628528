# SPDX-License-Identifier: Apache-2.0
"""The ring of training states on disk: its bounds, what it deletes and when, and who may rewind a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rl import storage
from lit_rl.callbacks import RECAP, AutoNPO, DivergenceGuard, NPOSchedule, Objective
from lit_rl.callbacks.guard import Bound
from lit_rl.checkpoint import RolloutCheckpoint, file_name
from lit_rl.hooks import RolloutCallback
from lit_rl.rewind import StateRing, check_rewinder
from lit_rl.samplers import HFSampler


class Run(SimpleNamespace):
    """A module between steps, as far as a ring looks at it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(run_dir=folder, clock=0, rollout_step=0, device=torch.device("cpu"))
        self.trainer = SimpleNamespace(callbacks=[RolloutCheckpoint()])

    def training_state(self) -> dict[str, Any]:
        return {"weights": {"w": torch.full((1000,), float(self.clock))}, "rollout_step": self.rollout_step}

    def checkpoint(self, ring: StateRing) -> None:
        """What saving a checkpoint does: the ring is told, then the file appears."""
        ring.refer(self)  # type: ignore[arg-type]
        path = self.run_dir / "checkpoints" / file_name(self.clock)
        storage.write_atomically(path, lambda f: f.write(b"x"))

    def remove_checkpoint(self, clock: int) -> None:
        (self.run_dir / "checkpoints" / file_name(clock)).unlink()


def opened(run: Run, **options: Any) -> StateRing:
    ring = StateRing(**{"max_entries": 2, **options})
    ring.open(run, "ring")  # type: ignore[arg-type]
    return ring


def save(ring: StateRing, run: Run, *steps: int) -> None:
    for step in steps:
        run.rollout_step = step
        run.clock += 1
        ring.save(run)  # type: ignore[arg-type]


def on_disk(run: Run) -> list[int]:
    return sorted(int(path.name[4:12]) for path in (run.run_dir / "ring").glob("step*"))


def test_the_number_of_states_is_bounded_and_the_oldest_go_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run, max_entries=3)
    save(ring, run, 0, 10, 20, 30, 40)
    assert ring.steps() == on_disk(run) == [20, 30, 40]
    assert ring.load(30)["weights"]["w"][0] == 4
    with pytest.raises(FileNotFoundError, match=r"rollout step 10, only of \[20, 30, 40\]"):
        ring.load(10)


def test_the_bytes_are_bounded_but_one_state_always_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run, max_entries=9)
    save(ring, run, 0)
    size = next((tmp_path / "ring").glob("step*")).stat().st_size
    ring.max_bytes = int(2.5 * size)
    save(ring, run, 1, 2, 3)
    assert ring.steps() == on_disk(run) == [2, 3]
    ring.max_bytes = 10
    save(ring, run, 4)
    assert ring.steps() == on_disk(run) == [4]


def test_a_file_stays_as_long_as_a_kept_checkpoint_refers_to_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0, 10)
    run.checkpoint(ring)
    first = run.clock
    save(ring, run, 20, 30)
    assert ring.steps() == [20, 30]
    assert on_disk(run) == [0, 10, 20, 30]
    run.checkpoint(ring)
    save(ring, run, 40)
    assert on_disk(run) == [0, 10, 20, 30, 40]
    run.remove_checkpoint(first)
    save(ring, run, 50)
    assert on_disk(run) == [20, 30, 40, 50]


def test_the_newest_reference_counts_before_its_checkpoint_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0, 10)
    ring.refer(run)  # type: ignore[arg-type]  # the run dies here, or the file takes a while
    save(ring, run, 20, 30)
    assert on_disk(run) == [0, 10, 20, 30]


def test_going_back_deletes_the_abandoned_future(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run, max_entries=9)
    save(ring, run, 0, 10, 20, 30)
    ring.forget_after(10)
    assert ring.steps() == on_disk(run) == [0, 10]


def test_a_resumed_run_finds_its_states_and_keeps_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0, 10)
    run.checkpoint(ring)
    state, clock = ring.state_dict(), run.clock
    save(ring, run, 20, 30, 40)  # lost work: the run is killed and resumed from the checkpoint
    run.clock, again = clock, StateRing(2)
    again.load_state_dict(state)
    again.open(run, "ring")  # type: ignore[arg-type]
    assert again.steps() == [0, 10]
    save(again, run, 20)
    assert again.steps() == [10, 20]
    assert again.load(10)["rollout_step"] == 10
    assert 0 in on_disk(run)  # the checkpoint that was resumed still refers to it
    assert 40 not in on_disk(run)  # nothing refers to the lost work


def test_states_that_are_gone_are_left_out_with_a_warning(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0, 10)
    state = ring.state_dict()
    next((tmp_path / "ring").glob("step00000000*")).unlink()
    again = StateRing(2)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"cannot go back to the rollout steps \[0\]"):
        again.open(run, "ring")  # type: ignore[arg-type]
    assert again.steps() == [10]


def test_a_write_that_fails_leaves_the_ring_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0)

    def broken(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        with pytest.raises(OSError, match="disk full"):
            save(ring, run, 10)
    assert ring.steps() == on_disk(run) == [0]


def test_each_rank_has_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    ring = opened(run)
    save(ring, run, 0, 10)
    state = ring.state_dict()
    monkeypatch.setattr("lit_rl.distributed.rank", lambda: 1)
    other = StateRing(2)
    other.load_state_dict(state)
    assert all(file.endswith("-rank1.pt") for file in other.files.values())
    with pytest.warns(UserWarning, match="cannot go back"):
        other.open(run, "ring")  # type: ignore[arg-type]
    other.forget_after(0)
    assert on_disk(run) == [0, 10]  # the files of rank 0


class Late(RolloutCallback):
    """Changes its state when the others have been saved."""

    def on_train_batch_end(self, *args: Any) -> None: ...


def setup(*callbacks: Any, sampler: Any = None) -> Any:
    return SimpleNamespace(
        trainer=SimpleNamespace(callbacks=list(callbacks)),
        sampler=sampler or HFSampler(),
        keep_entropy=True,
        max_rollouts=100,
    )


def rewinders() -> list[RolloutCallback]:
    return [AutoNPO(), NPOSchedule(0, 10), DivergenceGuard([Bound("reward/mean", low=0)])]


@pytest.mark.parametrize("which", range(3))
def test_a_sampler_that_carries_completions_over_is_refused(which: int) -> None:
    sampler = HFSampler()
    sampler.carries_over = True
    callback = rewinders()[which]
    with pytest.raises(ValueError, match="abandoned future"):
        callback.check_setup(setup(callback, sampler=sampler))
    callback.check_setup(setup(callback))


def test_a_callback_that_acts_after_the_rewind_is_refused() -> None:
    for callback in rewinders():
        with pytest.raises(ValueError, match="list Late first"):
            check_rewinder(callback, setup(callback, Late()))
        check_rewinder(callback, setup(Late(), callback))
        check_rewinder(callback, setup(callback, RECAP([Objective("x", "loss/sft")]), *rewinders()))


def test_a_guard_that_only_stops_takes_any_sampler() -> None:
    sampler = HFSampler()
    sampler.carries_over = True
    guard = DivergenceGuard([Bound("reward/mean", low=0)], action="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.check_setup(setup(guard, sampler=sampler))


def test_an_empty_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        StateRing(0)
