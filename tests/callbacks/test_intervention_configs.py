# SPDX-License-Identifier: Apache-2.0
"""Every shipped intervention stacks on the quickstart with every other: none replaces what is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rl.lightning_cli import LitRLCLI

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted((ROOT / "interventions").glob("*.yaml"))
BASE = ROOT / "quickstart.yaml"


class ParseOnly(LitRLCLI):
    """The command line up to the point where objects are made."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


@pytest.fixture(scope="module")
def parser() -> Any:
    return ParseOnly(["--config", str(BASE)], run=False).parser


def callbacks(parser: Any, *files: Path) -> list[str]:
    """Class names of the callbacks that these files give together."""
    arguments = [word for file in (BASE, *files) for word in ("--config", str(file))]
    found = parser.parse_args(arguments).trainer.callbacks
    return [callback.class_path.rsplit(".", 1)[1] for callback in found]


def written(file: Path) -> list[str]:
    """Class names of the callbacks that a file adds."""
    added = yaml.safe_load(file.read_text())["trainer"]["callbacks+"]
    return [(entry if isinstance(entry, str) else entry["class_path"]).rsplit(".", 1)[1] for entry in added]


def test_there_is_a_file_for_each_of_the_interventions() -> None:
    names = {file.stem for file in FILES}
    assert {"autonpo", "npo", "recap", "grpo_lambda", "dot", "pds", "dynamic_sampling", "all_four"} <= names
    assert {"schedule", "reference_update", "reward_alarm", "rollout_logger", "divergence_guard"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pair_of_files_adds_the_callbacks_of_both(parser: Any, file: Path) -> None:
    base = callbacks(parser)
    assert len(base) > 0
    assert callbacks(parser, file) == base + written(file)
    for other in FILES[FILES.index(file) + 1 :]:
        assert callbacks(parser, file, other) == base + written(file) + written(other), other.stem


def test_all_four_files_together_are_the_file_of_all_four(parser: Any) -> None:
    names = ("autonpo", "dot", "grpo_lambda", "recap")
    together = callbacks(parser, *(ROOT / "interventions" / f"{name}.yaml" for name in names))
    assert together == callbacks(parser, ROOT / "interventions" / "all_four.yaml")
    assert len(set(together)) == len(together)


def test_the_file_of_all_four_adds_its_reward_to_the_one_that_is_there(parser: Any) -> None:
    arguments = ["--config", str(BASE), "--config", str(ROOT / "interventions" / "all_four.yaml")]
    rewards = parser.parse_args(arguments).model.init_args.rewards
    assert [reward.class_path.rsplit(".", 1)[1] for reward in rewards] == ["ExactMatchReward", "FormatReward"]
