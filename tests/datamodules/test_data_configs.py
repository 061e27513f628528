# SPDX-License-Identifier: Apache-2.0
"""The shipped configurations run unchanged but for paths and sizes: a local policy, a local table."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from inputs_data import rows_file

from lit_rl.cli import main
from lit_rl.data import PromptDataModule
from lit_rl.datamodules import MixtureDataModule, TextDataModule
from lit_rl.testing import make_policy

CONFIGS = Path(__file__).parents[2] / "configs"
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the test run is not ours."""
    monkeypatch.setattr("sys.argv", ["lit-rl"])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A small local folder in hub format, with a chat template."""
    folder = make_policy(tmp_path / "policy", "qwen2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with a GSM8K of our own."""
    for split, size in (("train", 60), ("test", 4)):
        rows = [
            {"question": f"{split} {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"} for i in range(size)
        ]
        rows_file(tmp_path / "gsm8k" / f"{split}.jsonl", rows)
    return tmp_path / "gsm8k"


def fit(policy: Path, table: Path, run: Path, *configs: str, **overrides: Any) -> None:
    arguments = [a for name in configs for a in ("--config", str(CONFIGS / name))]
    values = {
        "model.init_args.policy.path": policy,
        "model.init_args.max_rollouts": 2,
        "model.init_args.prompts_per_step": 4,
        "model.init_args.group_size": 2,
        "model.init_args.sampling.max_tokens": 6,
        "data.init_args.path": table,
        "data.init_args.held_out": 0.3,
        "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.enable_progress_bar": "false",
        **overrides,
    }
    main(["fit", *arguments, *(f"--{name}={value}" for name, value in values.items())])


def test_the_gsm8k_configuration_trains_a_local_policy_on_a_local_table(
    policy: Path, table: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(policy, table, run, "gsm8k.yaml")
    assert (run / "checkpoints" / "clock00000002.ckpt").exists()
    rollouts = [json.loads(line) for f in sorted(run.glob("rollouts/*.jsonl")) for line in f.read_text().splitlines()]
    assert len(rollouts) >= 8
    for row in rollouts:  # the chat template once, the question, the request
        assert row["prompt"].startswith("[user] train ")
        assert row["prompt"].count("[user]") == row["prompt"].count("[assistant]") == 1
        assert "within \\boxed{}." in row["prompt"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["class_path"].endswith("GSM8KDataModule")


def test_the_lora_configuration_trains_adapters_only(policy: Path, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch

    run = tmp_path / "run"
    fit(policy, table, run, "gsm8k.yaml", "lora.yaml")
    state = torch.load(run / "checkpoints" / "clock00000002.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert saved["policy"]["lora"]["r"] == 16
    assert saved["optimizer"]["init_args"]["lr"] == 2e-5
    assert saved["rewards"][0]["class_path"].endswith("MathReward")


@pytest.mark.parametrize("name", ["math.yaml", *sorted(f"data/{file.name}" for file in (CONFIGS / "data").glob("*"))])
def test_every_data_configuration_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / name), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"] == yaml.safe_load((CONFIGS / name).read_text())["data"]["class_path"]


def build(name: str) -> Any:
    """The datamodule of a configuration; nothing is read yet."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(PromptDataModule, "data")
    data = yaml.safe_load((CONFIGS / name).read_text())["data"]
    return parser.instantiate(parser.parse_object({"data": data})).data


def test_the_file_configuration_divides_one_file_and_adds_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_file(tmp_path / "data" / "train.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(200)] + ["{"])
    rows_file(tmp_path / "data" / "hard.jsonl", [{"prompt": "hard?", "answer": "1"}])
    monkeypatch.chdir(tmp_path)
    data = build("data/jsonl.yaml")
    with pytest.warns(UserWarning, match="1 malformed row"):
        data.setup("fit")
    assert data.train_stream.size + len(data.eval_sets[0]) == 200
    assert [(s.name, s.samples) for s in data.eval_sets] == [("held_out", 1), ("hard", 16)]


def test_the_evaluation_configuration_joins_sets_of_the_hub() -> None:
    data = build("data/math_evaluation.yaml")
    assert isinstance(data, TextDataModule)
    assert [(s.label, s.split, s.samples) for s in data.val] == [
        ("math", "train", 1),
        ("aime24", "train", 32),
        ("svamp", None, 1),
    ]
    assert [s.label for s in data.test] == ["math500", "aime24", "svamp"]


def test_the_mixture_configuration_learns_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows_file(tmp_path / "data" / "conversations.jsonl", [{"messages": turns}])
    monkeypatch.chdir(tmp_path)
    data = build("data/mixture.yaml")
    assert isinstance(data, MixtureDataModule)
    data.setup("fit")
    records = data.train_stream.at(0, 8)
    assert sorted(r["source"] for r in records) == ["general"] * 2 + ["sums"] * 6
    assert {r.get("completion") for r in records} == {"hello", None}
