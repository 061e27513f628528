# SPDX-License-Identifier: Apache-2.0
"""Every distillation configuration trains from the command line: a local teacher, the toy task, and interventions."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_config import BASE

from lit_rl.cli import main
from lit_rl.testing import make_policy

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
