# SPDX-License-Identifier: Apache-2.0
"""A logged step's loss terms come out again from its stored batch, to 1e-6."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rl.analysis.replay import available, replay
from lit_rl.cli import main
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts
from lit_rl.storage import load_rollouts, save_rollouts
from lit_rl.testing import make_policy, run_on_ranks

REWARD = {
    "class_path": "lit_rl.rewards.FunctionReward",
    "init_args": {"function": "lit_rl.testing.toys.starts_with_digit", "name": "digit", "verifier": True},
}


class Fade(RolloutCallback):
    """Edits loss weights in place, by a factor that it remembers: replaying must neither forget nor repeat it."""

    def __init__(self) -> None:
        self.factor = 1.0

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        rollouts.loss_weights *= self.factor
        rollouts.loss_weights[0] = 0.0

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        self.factor *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor = state_dict["factor"]


def configuration(policy: Path, **options: Any) -> dict[str, Any]:
    init_args = {
        "policy": {"path": str(policy)},
        "rewards": REWARD,
        "sampling": {"max_tokens": 6},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        "reference": {"class_path": "lit_rl.policies.FrozenCopy"},
        "kl_coef": 0.1,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_rollouts": 7,
        "seed": 3,
    }
    schedule = {"target": "surrogate.clip_high", "start": 0.05, "end": 0.5, "steps": 6}
    return {
        "model": {"class_path": "lit_rl.GRPO", "init_args": init_args | options},
        "data": {"class_path": "lit_rl.testing.ToyData"},
        "trainer": {
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": f"{__name__}.Fade"},
                {"class_path": "lit_rl.callbacks.ScalarSchedule", "init_args": schedule},
                {"class_path": "lit_rl.callbacks.RolloutLogger", "init_args": {"every": 1}},
            ],
        },
        "checkpoint": {"every_n_rollouts": 2, "keep": 9},
    }


def fit(folder: Path, config: dict[str, Any]) -> Path:
    config = copy.deepcopy(config)
    config["trainer"]["default_root_dir"] = str(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "config.yaml")])
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One update on each batch."""
    folder = tmp_path_factory.mktemp("replay")
    return fit(folder, configuration(make_policy(folder / "policy")))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes of two updates on each batch: the weights move while the terms are added up."""
    folder = tmp_path_factory.mktemp("replay-long")
    return fit(folder, configuration(make_policy(folder / "policy"), updates_per_rollout=2, epochs_per_rollout=2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_step_with_a_checkpoint_before_it_comes_out_again(run: Path):
    before = contents(run)
    result = replay(run, 4)
    assert (result.start, result.stored) == (4, True)
    assert {t.name for t in result.terms} >= {"policy", "kl"}
    assert all(t.logged != 0 for t in result.terms if t.name == "kl")
    assert result.error < 1e-6
    assert contents(run) == before  # nothing is written into the run


def test_a_step_without_one_is_trained_forward_to_and_that_is_said(run: Path):
    result = replay(run, 5)
    assert (result.start, result.stored) == (4, True)
    assert result.error < 1e-6
    assert "stored batch, weights trained forward 1 step from the checkpoint at clock 4" in str(result)


@pytest.mark.parametrize("clock", [2, 3])
def test_several_updates_on_a_batch_come_out_again(long_run: Path, clock: int):
    result = replay(long_run, clock)
    assert result.start == 2
    assert result.error < 1e-6


def test_a_damaged_checkpoint_is_not_started_from(run: Path, tmp_path: Path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    path = broken / "checkpoints" / "clock00000004.ckpt"
    path.write_bytes(path.read_bytes()[:-10])
    result = replay(broken, 4)
    assert result.start == 2
    assert result.error < 1e-6


def test_without_a_checkpoint_the_beginning_and_without_a_batch_the_sampler_are_asked(run: Path, tmp_path: Path):
    bare = tmp_path / "run"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints", "rollouts"))
    result = replay(bare, 1)
    assert (result.start, result.stored) == (0, False)
    assert result.error < 1e-6
    assert "batch sampled again, weights trained forward 1 step from the initial policy" in str(result)


def test_it_is_the_stored_batch_that_is_replayed(run: Path, tmp_path: Path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    batch = load_rollouts(changed / "rollouts", "clock00000004-rank0")
    batch.advantages = batch.advantages * 2
    save_rollouts(batch, changed / "rollouts", "clock00000004-rank0")
    terms = {t.name: t for t in replay(changed, 4).terms}
    assert terms["policy"].replayed == pytest.approx(2 * terms["policy"].logged, rel=1e-5, abs=1e-6)
    assert terms["policy"].error > 1e-6
    assert terms["kl"].error < 1e-6


def test_a_clock_that_was_not_logged_is_answered_with_those_that_were(run: Path):
    with pytest.raises(ValueError, match="Logged are clocks 0 to 6; batches are stored of 0, 1, 2, 3, 4, 5, 6; chec"):
        replay(run, 70)
    assert available(run).endswith("checkpoints are at 2, 4, 6, 7.")


def test_the_command_prints_a_table_and_fails_where_a_term_differs(run: Path, tmp_path: Path, capsys: Any):
    main(["replay", str(run)])
    assert "Logged are clocks 0 to 6" in capsys.readouterr().out
    main(["replay", str(run), "--clock", "4"])
    printed = capsys.readouterr().out
    assert "step at clock 4, stored batch, weights of the checkpoint at clock 4" in printed
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(run), "--clock", "5", "--tolerance=-1"])
    assert stopped.value.code == 1
    assert "exceeds the tolerance" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(tmp_path), "--clock", "5"])
    assert stopped.value.code == 2


def fit_on_a_rank(rank: int, folder: str, policy: str) -> None:
    config = configuration(Path(policy))
    config["trainer"] |= {"strategy": "ddp", "devices": 2}
    fit(Path(folder), config)


def test_a_run_of_two_ranks_is_replayed_in_one_process(tmp_path: Path):
    run_on_ranks(fit_on_a_rank, 2, str(tmp_path), str(make_policy(tmp_path / "policy")))
    result = replay(tmp_path / "run", 4)
    assert (result.start, result.stored) == (4, True)
    assert result.error < 1e-6
