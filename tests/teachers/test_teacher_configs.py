# SPDX-License-Identifier: Apache-2.0
"""Every distillation configuration trains from the command line: a local teacher, the toy task, and interventions."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rl.cli import main
from lit_rl.testing import make_policy
from tests.toy_config import BASE

CONFIGS = Path(__file__).parents[2] / "configs"
TEACHER = "model.init_args.teacher.init_args.path"
TEMPLATE = "model.init_args.prompt.template"


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the test run is not ours."""
    monkeypatch.setattr("sys.argv", ["lit-rl"])


def fit(folder: Path, *configs: str, **values: Any) -> dict[str, Any]:
    """Two steps of the toy task with these configurations on top; returns the configuration that was saved."""
    base = folder / "base.yaml"
    base.write_text(BASE)
    settings = {
        "model.init_args.policy.path": make_policy(folder / "policy"),
        "trainer.default_root_dir": folder / "run",
    }
    if TEACHER in values:
        values[TEACHER] = make_policy(folder / "teacher", seed=3, hidden_size=48)
    files = [base, *(CONFIGS / name for name in configs)]
    arguments = [a for file in files for a in ("--config", str(file))]
    main(["fit", *arguments, *(f"--{k}={v}" for k, v in {**settings, **values}.items())])
    assert (folder / "run" / "checkpoints" / "clock00000002.ckpt").exists()
    return yaml.safe_load((folder / "run" / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("opd", {TEACHER: ""}),
        ("opd", {TEACHER: "", "model.init_args.loss": "policy_gradient"}),
        ("opsd", {TEMPLATE: "{answer}{prompt}"}),
        ("rlsd", {TEMPLATE: "{answer}{prompt}"}),
        ("gopd", {TEACHER: ""}),
        ("kdrl", {TEACHER: ""}),
        ("rlad", {TEACHER: ""}),
    ],
)
def test_method_configurations_train(tmp_path: Path, name: str, values: dict):
    saved = fit(tmp_path, f"methods/{name}.yaml", **values)
    written = yaml.safe_load((CONFIGS / "methods" / f"{name}.yaml").read_text())["model"]
    assert saved["model"]["class_path"].rsplit(".", 1)[1] == written["class_path"].rsplit(".", 1)[1]
    assert saved["model"]["init_args"].keys() >= written["init_args"].keys()


GROUPS = {"model.init_args.group_size": 4}
OPSD = {TEMPLATE: "{answer}{prompt}", **GROUPS}
CAOPD = {TEMPLATE: "{answer}{confidence}{prompt}", **GROUPS, "model.init_args.sampling.max_tokens": 24}
GRADIENT = {TEACHER: "", "model.init_args.loss": "policy_gradient", **GROUPS}


@pytest.mark.parametrize(
    ("configs", "values"),
    [
        (["methods/opd", "interventions/tip"], {TEACHER: ""}),
        (["methods/opsd", "interventions/paced"], OPSD),
        (["methods/opd", "interventions/uni_opd"], GRADIENT),
        (["methods/opsd", "interventions/caopd"], CAOPD),
    ],
)
def test_interventions_of_distillation_train(tmp_path: Path, configs: list[str], values: dict):
    saved = fit(tmp_path, *(f"{name}.yaml" for name in configs), **values)
    written = yaml.safe_load((CONFIGS / f"{configs[-1]}.yaml").read_text())["trainer"]["callbacks+"]
    names = [callback["class_path"].rsplit(".", 1)[1] for callback in saved["trainer"]["callbacks"]]
    assert [w["class_path"].rsplit(".", 1)[1] for w in written] == [n for n in names if n in str(written)]


RECAP = """
model:
  init_args:
    distill_coef: 1.0
trainer:
  callbacks+:
    - class_path: lit_rl.callbacks.RECAP
      init_args:
        window: 1
        objectives:
          - {name: distilled, monitor: loss/distill, kind: loss}
"""


@pytest.mark.parametrize(
    ("configs", "values"),
    [
        (["methods/kdrl", "interventions/dot"], {TEACHER: "", "model.init_args.group_size": 12}),
        (["methods/rlsd", "interventions/grpo_lambda"], OPSD),
        (["methods/opd"], {TEACHER: ""}),
    ],
    ids=["KDRL and DOT", "RLSD and GRPO-λ", "OPD and RECAP"],
)
def test_distillation_composes_with_interventions_of_rewards_and_losses(
    tmp_path: Path, configs: list[str], values: dict
):
    files = [f"{name}.yaml" for name in configs]
    if len(files) == 1:
        (tmp_path / "recap.yaml").write_text(RECAP)
        files.append(str(tmp_path / "recap.yaml"))
    fit(tmp_path, *files, **values)
