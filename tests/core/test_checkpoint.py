# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are written whole or not at all, checked when they are read, and never the last good one is lost."""

from __future__ import annotations

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_rl.checkpoint import DurableCheckpointIO, RolloutCheckpoint, is_intact, last_good_checkpoint
from lit_rl.policies import LoRA, Policy
from lit_rl.storage import write_atomically
from lit_rl.testing import assert_same_weights, final_state, make_module, make_policy, start_process, train


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def spoil(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def test_the_newest_checkpoints_are_kept_each_with_its_checksum(policy, tmp_path):
    train(tmp_path, make_module(policy, max_rollouts=7), [RolloutCheckpoint(every_n_rollouts=2, keep=3)])
    kept = [f"clock{clock:08d}.ckpt" for clock in (4, 6, 7)]
    assert files(tmp_path) == sorted([*kept, *(f"{name}.sha256" for name in kept)])
    assert all(is_intact(tmp_path / "checkpoints" / name) for name in kept)


def test_a_checkpoint_can_be_due_by_time(policy, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 20))  # a clock that moves 20 seconds at each look
    monkeypatch.setattr("lit_rl.checkpoint.time.monotonic", lambda: float(next(now)))
    saver = RolloutCheckpoint(every_n_rollouts=1000, every_n_minutes=1.0, keep=100)
    train(tmp_path, make_module(policy, max_rollouts=9), [saver])
    clocks = [int(p.name[5:13]) for p in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert 3 <= len(clocks) < 9


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_refused_when_named(policy, tmp_path):
    module = make_module(policy, max_rollouts=4)
    train(tmp_path, module, [RolloutCheckpoint(every_n_rollouts=2)])
    newest = tmp_path / "checkpoints" / "clock00000004.ckpt"
    spoil(newest)
    with pytest.warns(UserWarning, match="clock00000004.ckpt is damaged"):
        found = last_good_checkpoint(tmp_path)
    assert found.name == "clock00000002.ckpt"
    with pytest.raises(ValueError, match=r"is damaged .* --ckpt_path last finds the newest that is intact"):
        train(tmp_path, make_module(policy, max_rollouts=5), checkpoint=newest)
    rest = make_module(policy, max_rollouts=4)
    train(tmp_path, rest, checkpoint=found)
    assert_same_weights(final_state(module), final_state(rest))
    assert is_intact(newest)  # the run has passed it again


def test_a_file_without_its_checksum_is_not_trusted(policy, tmp_path):
    train(tmp_path, make_module(policy, max_rollouts=2), [RolloutCheckpoint(every_n_rollouts=1)])
    (tmp_path / "checkpoints" / "clock00000002.ckpt.sha256").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert last_good_checkpoint(tmp_path).name == "clock00000001.ckpt"


def test_a_run_that_has_not_saved_yet_has_no_last_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path) is None


def test_checkpoints_of_an_abandoned_future_are_removed(policy, tmp_path):
    train(tmp_path, make_module(policy, max_rollouts=6), [RolloutCheckpoint(every_n_rollouts=2, keep=3)])
    early = tmp_path / "checkpoints" / "clock00000002.ckpt"
    train(tmp_path, make_module(policy, max_rollouts=3), [RolloutCheckpoint(keep=2)], checkpoint=early)
    assert [f for f in files(tmp_path) if f.endswith("ckpt")] == ["clock00000002.ckpt", "clock00000003.ckpt"]


def test_checkpoints_load_without_executing_anything_and_leave_frozen_weights_out(policy, tmp_path):
    module = make_module(policy, max_rollouts=1)
    module.policy = Policy(str(policy), lora=LoRA(r=2))
    train(tmp_path, module)
    state = torch.load(tmp_path / "checkpoints" / "clock00000001.ckpt", weights_only=True)
    assert state["state_dict"]
    assert all("lora" in name for name in state["state_dict"])


def test_a_checkpoint_of_another_program_is_refused(policy, tmp_path):
    train(tmp_path, make_module(policy, max_rollouts=1))
    state = torch.load(tmp_path / "checkpoints" / "clock00000001.ckpt", weights_only=True)
    del state["lit_rl"]
    DurableCheckpointIO().save_checkpoint(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not written by lit-rl"):
        train(tmp_path, make_module(policy), checkpoint=tmp_path / "other.ckpt")


def test_a_directory_that_cannot_be_written_to_is_announced_before_the_first_step(policy, tmp_path):
    (tmp_path / "file").write_text("")  # below a regular file not even root can make a directory
    module = make_module(policy)
    with pytest.raises(OSError, match=r"Checkpoints cannot be written to .*Not a directory.* Choose another"):
        train(tmp_path, module, [RolloutCheckpoint(folder=str(tmp_path / "file" / "checkpoints"))])
    assert module.clock == 0


def fill_the_disk(folder: Path, policy: Path) -> None:
    """Trains with room for two checkpoints only, and notes what it was told."""

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.clock == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(folder, make_module(policy), [Fill(), RolloutCheckpoint(every_n_rollouts=1)])
    except OSError as error:
        (folder / "message").write_text(str(error))


def test_a_full_disk_stops_the_run_with_a_sentence_and_leaves_the_previous_checkpoint(policy, tmp_path):
    process = start_process(fill_the_disk, tmp_path, policy)
    process.join(120)
    message = (tmp_path / "message").read_text()
    assert message.startswith(
        f"Could not write the checkpoint {tmp_path}/checkpoints/clock00000003.ckpt: File too large"
    )
    assert "previous checkpoint is untouched" in message
    assert not list(tmp_path.rglob(".*.partial"))
    assert last_good_checkpoint(tmp_path).name == "clock00000002.ckpt"


def test_what_a_killed_writer_left_is_cleaned_up(policy, tmp_path):
    rest = tmp_path / "checkpoints" / ".clock00000009.ckpt.123.partial"
    rest.parent.mkdir()
    rest.write_bytes(b"half")
    train(tmp_path, make_module(policy, max_rollouts=1))
    assert not rest.exists()


def test_readers_see_the_old_content_or_the_new_one(tmp_path):
    path, sizes = tmp_path / "file", set()
    write_atomically(path, lambda f: f.write(b"a" * 100_000))
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            blob = path.read_bytes()
            sizes.add((len(blob), len(set(blob))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in (b"b", b"c") * 20:
        write_atomically(path, lambda f, x=letter: [f.write(x * 1000) for _ in range(100)])
    done.set()
    reader.join()
    assert sizes == {(100_000, 1)}


def test_a_failed_write_leaves_the_old_content_and_no_trace(tmp_path):
    path = write_atomically(tmp_path / "file", lambda f: f.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"ne")
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every_n_rollouts": 0}, "every_n_rollouts must be at least 1"), ({"keep": 1}, "keep must be at least 2")],
)
def test_settings_that_could_lose_a_run_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutCheckpoint(**options)
