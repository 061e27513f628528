# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or rewound continues exactly as if nothing had happened, logs included."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor

from lit_rl.checkpoint import RolloutCheckpoint, last_good_checkpoint
from lit_rl.methods import RLModule
from lit_rl.testing import assert_same_weights, final_state, make_module, make_policy, start_process, train
from tests.core.runs import Refill, full_module, logged_run, run_in_child, scalars, wait_until

STEPS = 12


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, Path]:
    """A run that nobody interrupts, and its directory."""
    folder = tmp_path_factory.mktemp("whole")
    return logged_run(folder, policy, STEPS), folder


def everything(module: RLModule) -> dict[str, Any]:
    """The state of a finished run, as its last checkpoint has it."""
    path = last_good_checkpoint(module.run_dir)
    assert path is not None
    state = torch.load(path, weights_only=True)
    return {name: state[name] for name in ("lit_rl", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")}


def assert_same(mine: Any, theirs: Any, where: str = "state") -> None:
    """Equal to the last bit, wherever a tensor is."""
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), f"{where}: off by {(mine - theirs).abs().max():.3g}"
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key, value in mine.items():
            assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs), where
        for i, (a, b) in enumerate(zip(mine, theirs)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert mine == theirs, f"{where}: {mine} is not {theirs}"


def assert_same_run(whole: tuple[RLModule, Path], rest: RLModule, folder: Path) -> None:
    reference, reference_folder = whole
    assert_same_weights(final_state(reference), final_state(rest))
    assert_same(everything(reference), everything(rest))
    expected, found = scalars(reference_folder), scalars(folder)
    found.pop("lr-AdamW", None)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == values, f"{name} was logged as {found[name]} instead of {values}"


class StopAt(Callback):
    """Ends a run after a step, in the middle of its course, as a signal would."""

    def __init__(self, clock: int, number: int = signal.SIGTERM, during: str = "on_train_batch_end") -> None:
        self.clock, self.number = clock, number
        setattr(self, during, self.act)

    def act(self, trainer: Any, module: Any, *args: Any) -> None:
        if module.clock == self.clock:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("clock", [4, 6, 7])  # 6: a validation is due there
def test_a_run_that_was_stopped_between_steps_continues_as_if_it_had_not(whole, policy, tmp_path, clock):
    first = logged_run(tmp_path, policy, STEPS, callbacks=[StopAt(clock)])
    assert first.clock == clock
    rest = logged_run(
        tmp_path, policy, STEPS, checkpoint=last_good_checkpoint(tmp_path), callbacks=[LearningRateMonitor("step")]
    )
    assert rest.clock == STEPS
    by_lightning = scalars(tmp_path).pop("lr-AdamW")
    assert [step for step, _ in by_lightning] == list(range(clock, STEPS))  # other callbacks log at the clock too
    assert_same_run(whole, rest, tmp_path)


def test_a_run_that_ended_continues_when_more_steps_are_asked_for(whole, policy, tmp_path):
    logged_run(tmp_path, policy, 5)
    rest = logged_run(tmp_path, policy, STEPS, checkpoint=last_good_checkpoint(tmp_path))
    assert_same_weights(final_state(whole[0]), final_state(rest))
    expected, found = scalars(whole[1]), scalars(tmp_path)
    extra = [(4, value) for step, value in found["val/pass@1"] if step == 4]  # the run validated when it ended
    assert sorted([*expected["val/pass@1"], *extra]) == found["val/pass@1"]
    for name in expected:
        if not name.startswith(("val/", "epoch")):
            assert found[name] == expected[name], name


class Interrupt(Callback):
    """Sends a signal while completions are sampled: at the second token of a step."""

    def __init__(self, clock: int, number: int) -> None:
        self.clock, self.number = clock, number

    def on_rollout_request(self, trainer: Any, module: Any, request: Any) -> None:
        if module.clock != self.clock:
            return
        asked = request.should_stop

        def should_stop(progress: Any) -> bool:
            if progress.step == 2:
                signal.raise_signal(self.number)
            return asked(progress)

        request.should_stop = should_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sampling_undoes_the_step_and_the_resumed_run_draws_it_again(whole, policy, tmp_path, number):
    first = logged_run(tmp_path, policy, STEPS, callbacks=[Interrupt(5, number)])
    assert first.clock == first.rollout_step == 5
    assert first.cursor == everything(first)["lit_rl"]["cursor"]
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*.ckpt")) == ["clock00000004.ckpt", "clock00000005.ckpt"]
    rest = logged_run(tmp_path, policy, STEPS, checkpoint=last_good_checkpoint(tmp_path))
    assert_same_run(whole, rest, tmp_path)


def test_a_run_that_is_over_says_so_when_it_is_continued(policy, tmp_path, caplog):
    logged_run(tmp_path, policy, 2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        logged_run(tmp_path, policy, 2, checkpoint=last_good_checkpoint(tmp_path))
    assert (
        "Nothing is left to do: the checkpoint is at rollout step 2 and the run ends at max_rollouts=2." in caplog.text
    )


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM; the file that its ``scontrol`` writes its words to."""
    job = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "4711", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    said, tool = tmp_path / "bin" / "said", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return said


def test_the_signal_before_the_end_of_a_slurm_job_saves_between_two_steps_and_queues_the_job_again(
    whole, policy, tmp_path, slurm
):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    folder = tmp_path / "run"
    first = logged_run(folder, policy, STEPS, callbacks=[Interrupt(5, signal.SIGUSR1)])
    assert first.clock == first.rollout_step == 5
    assert slurm.read_text() == "requeue 4711\n"
    assert sorted(p.name for p in folder.rglob("*.ckpt")) == ["clock00000004.ckpt", "clock00000005.ckpt"]  # no hpc_ckpt
    assert [signal.getsignal(number) for number in numbers] == before
    rest = logged_run(folder, policy, STEPS, checkpoint=last_good_checkpoint(folder))
    assert_same_run(whole, rest, folder)
    assert slurm.read_text() == "requeue 4711\n"  # the second job came to its end


def test_a_slurm_that_does_not_queue_the_job_again_is_announced(policy, tmp_path, slurm):
    (slurm.parent / "scontrol").write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    with pytest.warns(UserWarning, match=r"did not queue job 4711 again \(not allowed\)"):
        logged_run(tmp_path / "run", policy, STEPS, callbacks=[Interrupt(1, signal.SIGUSR1)])


def test_a_validation_that_a_signal_cuts_short_is_not_reported_and_made_up_for_on_resume(whole, policy, tmp_path):
    class InterruptValidation(Callback):
        def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.state.fn == "fit":
                signal.raise_signal(signal.SIGTERM)

    module = logged_run(tmp_path, policy, STEPS, callbacks=[InterruptValidation()])
    assert module.clock == 3
    assert "val/pass@1" not in scalars(tmp_path)
    assert last_good_checkpoint(tmp_path).name == "clock00000003.ckpt"
    rest = logged_run(tmp_path, policy, STEPS, checkpoint=last_good_checkpoint(tmp_path))
    assert_same_run(whole, rest, tmp_path)  # the validation was made up for


@pytest.mark.parametrize("seed", range(2))
def test_after_sigkill_at_a_random_moment_weights_states_and_logs_equal_those_of_an_undisturbed_run(
    whole, policy, tmp_path, seed
):
    process = start_process(run_in_child, tmp_path, policy, STEPS, 2, 0.02)
    wait_until(lambda: list(tmp_path.glob("checkpoints/*.ckpt")))
    time.sleep(random.Random(seed + os.getpid()).uniform(0, 0.25))
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    rest = logged_run(tmp_path, policy, STEPS, checkpoint=last_good_checkpoint(tmp_path))
    assert_same_run(whole, rest, tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_from_outside_end_the_process_with_their_status_and_a_checkpoint(policy, tmp_path, number, status):
    process = start_process(run_in_child, tmp_path, policy, 1000, 1000, 0.02, 1)
    wait_until((tmp_path / "pausing").exists)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    path = last_good_checkpoint(tmp_path)
    clock = torch.load(path, weights_only=True)["lit_rl"]["clock"]
    assert 0 < clock < 1000
    assert path.name == f"clock{clock:08d}.ckpt"


def test_a_second_ctrl_c_aborts_at_once_and_leaves_the_last_good_file(policy, tmp_path):
    process = start_process(run_in_child, tmp_path, policy, 1000, 2, 100.0, 3)
    wait_until((tmp_path / "pausing").exists)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.exitcode is None  # the first one waits for the step
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert last_good_checkpoint(tmp_path).name == "clock00000002.ckpt"


def test_a_rewind_with_nothing_to_inject_replays_bit_for_bit(policy, tmp_path):
    from lit_rl.rewind import StateRing, rewind

    seen: dict[int, list[dict[str, torch.Tensor]]] = {}

    class BackOnce(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.ring = StateRing(4)
            self.ring.open(pl_module, "ring")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.setdefault(pl_module.rollout_step, []).append(final_state(pl_module))
            if pl_module.clock == 2:
                self.ring.save(pl_module)
            if pl_module.clock == 5:
                rewind(pl_module, self.ring, 2)

    module = full_module(policy, 6)
    train(tmp_path, module, [Refill(), BackOnce()])
    assert (module.clock, module.rollout_step) == (9, 6)
    for step in (3, 4, 5):
        first, second = seen[step]
        assert_same_weights(first, second)


def test_a_checkpoint_of_other_data_or_another_seed_says_so(policy, tmp_path):
    train(tmp_path, make_module(policy, max_rollouts=2), [RolloutCheckpoint()])
    with pytest.warns(UserWarning, match="seed=4, but the checkpoint was written with seed=3"):
        train(tmp_path, make_module(policy, max_rollouts=3, seed=4), checkpoint=last_good_checkpoint(tmp_path))
