# SPDX-License-Identifier: Apache-2.0
"""Every sampler configuration runs from the command line, over a run and over another sampler's configuration."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rl.cli import main
from lit_rl.testing import make_policy
from tests.toy_config import BASE

CONFIGS = Path(__file__).parents[2] / "configs" / "samplers"
THREAD = {"async": {"model.init_args.sampler.init_args.worker": "thread"}}  # a process takes seconds to start


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the test run is not ours."""
    monkeypatch.setattr("sys.argv", ["lit-rl"])


def fit(folder: Path, *names: str) -> dict[str, Any]:
    """Two steps of the toy task with these samplers' files on top; returns the sampler of the saved configuration."""
    (folder / "base.yaml").write_text(BASE)
    files = [folder / "base.yaml", *(CONFIGS / f"{name}.yaml" for name in names)]
    arguments = [a for file in files for a in ("--config", str(file))]
    settings = {
        "model.init_args.policy.path": make_policy(folder / "policy"),
        "trainer.default_root_dir": folder / "run",
        **THREAD.get(names[-1], {}),
    }
    main(["fit", *arguments, *(f"--{k}={v}" for k, v in settings.items())])
    assert (folder / "run" / "checkpoints" / "clock00000002.ckpt").exists()
    return yaml.safe_load((folder / "run" / "config.yaml").read_text())["model"]["init_args"]["sampler"]


NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def test_every_wrapper_has_a_configuration():
    assert {"async", "calculator", "hf", "partial", "two_stage"} <= set(NAMES)


@pytest.mark.parametrize("name", ["async", "calculator", "hf", "partial", "two_stage"])
def test_a_sampler_is_exchanged_by_its_file_alone(tmp_path: Path, name: str):
    saved = fit(tmp_path, name)
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]["sampler"]
    assert saved["class_path"].rsplit(".", 1)[1] == written["class_path"].rsplit(".", 1)[1]
    for key, value in written["init_args"].items():
        if not isinstance(value, dict) and key != "worker":
            assert saved["init_args"][key] == value


@pytest.mark.parametrize(("first", "second"), [("partial", "two_stage"), ("two_stage", "partial")])
def test_a_later_sampler_replaces_an_earlier_one(tmp_path: Path, first: str, second: str):
    saved = fit(tmp_path, first, second)
    written = yaml.safe_load((CONFIGS / f"{second}.yaml").read_text())["model"]["init_args"]["sampler"]
    assert saved["class_path"].rsplit(".", 1)[1] == written["class_path"].rsplit(".", 1)[1]
    assert saved["init_args"].keys() == written["init_args"].keys()
