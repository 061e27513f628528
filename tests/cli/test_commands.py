# SPDX-License-Identifier: Apache-2.0
"""The commands, in this process, on one small run: fit, then everything that one does with a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.cli import main
from lit_rl.data import EvalSet, ListStream, PromptDataModule
from lit_rl.policies import Policy
from lit_rl.testing import ToyData, make_policy, run_on_ranks

ROLLOUTS = 5


class TwoEvaluations(ToyData):
    """The toy task with two evaluation sets."""

    def build(self, stage: str) -> None:
        super().build(stage)
        records = [{"prompt": f"{i}+1=", "answer": str(i), "source": "sums"} for i in range(3)]
        few = EvalSet("few", ListStream(records, shuffle=False), samples=2, temperature=0.5)
        self.eval_sets = [*self.eval_sets, few]


def configuration(policy: Path) -> dict[str, Any]:
    return {
        "model": {
            "class_path": "lit_rl.GRPO",
            "init_args": {
                "policy": {"path": str(policy)},
                "rewards": [
                    {
                        "class_path": "lit_rl.rewards.FunctionReward",
                        "init_args": {
                            "function": "lit_rl.testing.toys.starts_with_digit",
                            "name": "digit",
                            "verifier": True,
                        },
                    }
                ],
                "sampling": {"max_tokens": 6},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "prompts_per_step": 4,
                "group_size": 4,
                "max_rollouts": ROLLOUTS,
                "seed": 3,
            },
        },
        "data": {"class_path": f"{__name__}.TwoEvaluations"},
        "trainer": {
            "accelerator": "cpu",
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "lit_rl.callbacks.RolloutLogger", "init_args": {"every": 2}},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "monitor": "val/pass@1",
                        "mode": "max",
                        "filename": "best-step{rollout_step:.0f}-{val/pass@1:.3f}",
                        "auto_insert_metric_name": False,
                    },
                },
            ],
        },
        "checkpoint": {"every_n_rollouts": 2},
    }


class Run:
    """A finished run, and the command line that continues or evaluates it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder / "run", folder / "config.yaml"
        self.policy = make_policy(folder / "policy")
        self.config.write_text(yaml.safe_dump(configuration(self.policy)))
        self.words("fit")

    def words(self, command: str, *options: str) -> None:
        main([command, "--config", str(self.config), f"--trainer.default_root_dir={self.folder}", *options])

    def events(self) -> EventAccumulator:
        return EventAccumulator(str(self.folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("command-line"))


def steps_of(path: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("clock")) for p in path.glob("clock*.ckpt"))


def test_a_fit_leaves_its_configuration_checkpoints_and_logs(run: Run):
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["max_rollouts"] == ROLLOUTS
    assert steps_of(run.folder / "checkpoints") == [4, 5]
    clocks = [e.step for e in run.events().Scalars("reward/mean")]
    assert clocks == list(range(ROLLOUTS))


def test_the_best_checkpoint_is_that_of_the_best_validation(run: Run):
    values = {e.step: e.value for e in run.events().Scalars("val/pass@1")}
    assert list(values) == [1, 3, 4]  # after every two steps and at the end
    (best,) = run.folder.rglob("best*.ckpt")
    step = max(values, key=lambda s: (values[s], -s))
    state = torch.load(best, weights_only=True)
    assert state["lit_rl"]["rollout_step"] == step + 1
    assert best.name == f"best-step{step}-{values[step]:.3f}.ckpt"


def test_a_second_fit_in_the_same_directory_is_refused_or_moves_the_first_aside(run: Run, tmp_path: Path, capsys: Any):
    with pytest.raises(SystemExit) as stopped:
        run.words("fit")
    assert stopped.value.code == 2
    assert "already holds a run. Continue it with --ckpt_path last" in capsys.readouterr().err
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.yaml").write_text("model: old")
    short = ["--model.init_args.max_rollouts=1", "--trainer.limit_val_batches=0"]
    main(["fit", "--config", str(run.config), f"--trainer.default_root_dir={other}", "--overwrite=true", *short])
    assert (tmp_path / "other.old1" / "config.yaml").read_text() == "model: old"
    assert steps_of(other / "checkpoints") == [1]


def test_the_last_checkpoint_is_continued_and_a_first_start_may_ask_for_it(run: Run, tmp_path: Path, capsys: Any):
    folder = tmp_path / "again"
    words = ["fit", "--config", str(run.config), f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]
    words += ["--trainer.limit_val_batches=0"]
    main([*words, "--model.init_args.max_rollouts=1"])
    assert "starting from the beginning" in capsys.readouterr().err
    main([*words, "--model.init_args.max_rollouts=2"])
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("reward/mean")] == [0, 1]


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("which", ["last", "best"])
def test_an_evaluation_of_a_checkpoint_is_that_of_its_weights(command: str, which: str, run: Run, capsys: Any):
    values = [e.value for e in run.events().Scalars("val/pass@1")]
    run.words(command, "--ckpt_path", which, "--trainer.logger=false")
    printed = capsys.readouterr().out
    name = "val" if command == "validate" else "test"
    assert f"{name}/pass@1" in printed
    assert f"{name}/few/pass@2" in printed
    if which == "best":
        (line,) = [line for line in printed.splitlines() if f"{name}/pass@1" in line]
        found = float(line.replace("│", " ").split()[-1])
        assert found == pytest.approx(max(values), abs=1e-6)
    assert not list(run.folder.glob("*.old*"))
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["ckpt_path"] is None  # still that of the fit


def test_evaluating_a_checkpoint_that_is_not_there_is_an_error(run: Run, tmp_path: Path, capsys: Any):
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "--config", str(run.config), f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last"])
    assert stopped.value.code == 2
    assert "There is no last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["lst", "clock00000005.ckpt", "runs/nope.ckpt"])
def test_a_checkpoint_file_that_is_not_there_is_answered_with_the_one_that_was_meant(
    path: str, run: Run, tmp_path: Path, capsys: Any
):
    meant = {"lst": "last", "clock00000005.ckpt": run.folder / "checkpoints" / "clock00000005.ckpt"}
    hint = f" Did you mean {meant[path]}?" if path in meant else ""
    with pytest.raises(SystemExit) as stopped:
        run.words("fit", "--ckpt_path", path)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"lit-rl fit: There is no checkpoint {path}: give a file, last or best to --ckpt_path.{hint}"
    with pytest.raises(SystemExit):
        main(["export", str(run.folder), str(tmp_path / "out"), "--checkpoint", path])
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"lit-rl export: There is no checkpoint {path}: give a file, last or best to --checkpoint.{hint}"


def test_an_evaluation_before_training_does_not_count_as_a_run(run: Run, tmp_path: Path):
    folder = f"--trainer.default_root_dir={tmp_path / 'fresh'}"
    main(["validate", "--config", str(run.config), folder])
    short = ["--model.init_args.max_rollouts=1", "--trainer.limit_val_batches=0"]
    main(["fit", "--config", str(run.config), folder, *short])
    events = EventAccumulator(str(tmp_path / "fresh")).Reload()
    assert len(events.Scalars("val/pass@1")) == 1


def test_an_evaluation_of_the_untrained_policy_beside_checkpoints_says_so(run: Run, tmp_path: Path, capsys: Any):
    run.words("validate", "--trainer.logger=false")
    advice = f"For the one that was trained in {run.folder} add --ckpt_path last or --ckpt_path best."
    assert advice in capsys.readouterr().err
    run.words("validate", "--trainer.logger=false", "--ckpt_path=last")
    main(["validate", "--config", str(run.config), f"--trainer.default_root_dir={tmp_path}"])
    assert "that was trained in" not in capsys.readouterr().err


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_a_line_a_completion_with_scores_one_file_a_set(run: Run):
    run.words("predict", "--ckpt_path=last", "--trainer.logger=false")
    folder = run.folder / "predictions"
    assert sorted(p.name for p in folder.iterdir()) == ["few.jsonl", "toy.jsonl"]
    rows = rows_of(folder / "few.jsonl")
    assert [(r["index"], r["sample"]) for r in rows] == [(i, s) for i in range(3) for s in range(2)]
    assert len(rows_of(folder / "toy.jsonl")) == 8
    for row in rows:
        assert row["prompt"] == f"{row['index']}+1="
        assert row["columns"] == {"answer": str(row["index"])}
        assert row["source"] == "sums"
        right = float(row["completion"][:1].isdigit())
        assert row["reward"] == row["correct"] == row["rewards"]["digit"] == right
        assert 0 < row["tokens"] <= 6
    before = (folder / "few.jsonl").read_bytes()
    run.words("predict", "--ckpt_path=last", "--trainer.logger=false")
    assert (folder / "few.jsonl").read_bytes() == before


def predict_on_a_rank(rank: int, config: str, folder: str) -> None:
    parallel = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.logger=false"]
    main(["predict", "--config", config, f"--trainer.default_root_dir={folder}", *parallel])


def test_two_ranks_write_a_file_each_and_together_what_one_writes(run: Run, tmp_path: Path):
    main(["predict", "--config", str(run.config), f"--trainer.default_root_dir={tmp_path / 'one'}"])
    run_on_ranks(predict_on_a_rank, 2, str(run.config), str(tmp_path / "two"))
    for name in ("few", "toy"):
        parts = [tmp_path / "two" / "predictions" / f"{name}-rank{rank}.jsonl" for rank in (0, 1)]
        rows = sorted((r for p in parts for r in rows_of(p)), key=lambda r: (r["index"], r["sample"]))
        assert rows == rows_of(tmp_path / "one" / "predictions" / f"{name}.jsonl")


def test_an_exported_policy_has_the_weights_of_its_checkpoint(run: Run, tmp_path: Path):
    for which in ("last", "best"):
        main(["export", str(run.folder), str(tmp_path / which), "--checkpoint", which])
        model, tokenizer = Policy(str(tmp_path / which)).load()
        (path,) = run.folder.rglob({"last": "clock00000005.ckpt", "best": "best*.ckpt"}[which])
        state = torch.load(path, weights_only=True)["state_dict"]
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[f"model.{name}"]), name
        assert tokenizer.decode(tokenizer("1+2=")["input_ids"]) == "1+2="


def test_the_plan_checks_everything_prints_and_leaves_nothing(run: Run, tmp_path: Path, capsys: Any):
    folder = tmp_path / "planned"
    (words := ["fit", "--config", str(run.config), f"--trainer.default_root_dir={folder}"]).append("--print_plan")
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("lit-rl ")
    assert "evaluation few: 3 prompts × 2 completions, temperature 0.5" in printed
    assert "peak, update" in printed
    assert not folder.exists()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--model.init_args.updates_per_rollout=3"])
    assert stopped.value.code == 2
    assert "does not divide into updates_per_rollout=3" in capsys.readouterr().err


def test_an_empty_evaluation_is_an_error_that_says_so(run: Run, tmp_path: Path, capsys: Any):
    with pytest.raises(SystemExit) as stopped:
        run.words("predict", f"--data={__name__}.NoEvaluation", f"--trainer.default_root_dir={tmp_path}")
    assert stopped.value.code == 2
    assert "There is nothing to predict: NoEvaluation was given no evaluation data." in capsys.readouterr().err
    assert not (tmp_path / "predictions").exists()


class NoEvaluation(PromptDataModule):
    """Training data alone."""

    def build(self, stage: str) -> None:
        self.train_stream = ListStream([{"prompt": "1+1="}])


def test_a_new_policy_is_a_folder_in_hub_format(tmp_path: Path, capsys: Any):
    main(["new-policy", str(tmp_path / "p"), "--hidden_size", "16", "--num_layers", "1", "--intermediate_size", "32"])
    model, _ = Policy(str(tmp_path / "p")).load()
    assert model.config.hidden_size == 16
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out


def test_exporting_what_is_no_run_is_an_error_that_says_so(tmp_path: Path, capsys: Any):
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "There is no run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "empty"), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "There is no last checkpoint below" in said
    assert "name a file with --checkpoint." in said


def test_an_export_does_not_write_over_something_else(tmp_path: Path, capsys: Any):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), str(tmp_path / "out")])
    assert "is there already: name another folder, or pass --overwrite true" in capsys.readouterr().err


def test_an_earlier_export_is_replaced_only_on_demand(run: Run, tmp_path: Path, capsys: Any):
    words = ["export", str(run.folder), str(tmp_path / "out")]
    main(words)
    (tmp_path / "out" / "model.safetensors").write_text("broken")
    with pytest.raises(SystemExit):
        main(words)
    assert "pass --overwrite true" in capsys.readouterr().err
    main([*words, "--overwrite", "true"])
    Policy(str(tmp_path / "out")).load()
