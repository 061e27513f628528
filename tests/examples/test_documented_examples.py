# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows runs, and what it names exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.rewards import FunctionReward, RewardInput
from lit_rl.testing import make_module, make_policy, train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Files and folders of the repository, as prose and commands name them.
NAMED = re.compile(r"(?<![\w/.-])((?:configs|examples|benchmarks|docs)/[\w./-]*\w|lit_rl/[\w/]+\.py)")
PLACEHOLDERS = {"benchmarks/NAME.py"}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for name in ("my_callback", "my_reward"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path):
    named = set(NAMED.findall(page.read_text())) - PLACEHOLDERS
    missing = [name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))]
    assert not missing, f"{page.name} names {missing}"


def test_included_files_are_marked_as_such():
    for page in PAGES:
        broken = [line for line in page.read_text().splitlines() if "8" in line and re.search(r"--8\s+<", line)]
        assert not broken, f"{page.name}: {broken}"


def test_the_example_callback_trains(examples: None, tmp_path: Path):
    import my_callback  # type: ignore[import-not-found]

    kinds = [v for v in vars(my_callback).values() if isinstance(v, type) and v.__module__ == "my_callback"]
    assert kinds, "the example defines no callback"
    module = make_module(make_policy(tmp_path / "policy"), max_rollouts=3)
    train(tmp_path / "run", module, [kind() for kind in kinds])
    assert module.clock == 3


def test_the_example_reward_scores_what_it_can(examples: None):
    import my_reward  # type: ignore[import-not-found]

    texts = ["Please, 4", "4", ""]
    batch = RewardInput(
        prompts=["2+2="] * 3,
        completions=texts,
        completion_ids=[[1]] * 3,
        lengths=torch.ones(3, dtype=torch.long),
        finished=torch.ones(3, dtype=torch.bool),
        group=torch.zeros(3, dtype=torch.long),
        columns={},
        source=[""] * 3,
        max_length=8,
    )
    values = FunctionReward(my_reward.says_please, name="polite")(batch)
    assert values[:2].tolist() == [1.0, 0.0]
    assert bool(values[2].isnan())


def test_the_example_reward_of_one_completion_reads_its_column(examples: None):
    import my_reward

    assert my_reward.close_enough("7+8=15#15", "15") == 1.0
    assert my_reward.close_enough("#13", "15") == pytest.approx(1 / 3)
    assert my_reward.close_enough("#", "15") == my_reward.close_enough("none", "15") == 0.0


def test_the_page_shows_the_examples_as_they_are():
    page = (ROOT / "docs" / "extend.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    files = [(ROOT / "examples" / f"{name}.py").read_text() for name in ("my_callback", "my_reward")]
    strange = [code for code in shown if not any(code.strip() in text for text in files)]
    assert len(shown) == 4
    assert not strange


def test_the_callback_of_the_readme_runs(tmp_path: Path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(code[1], scope)
    module = make_module(make_policy(tmp_path / "policy"), max_rollouts=2)
    train(tmp_path / "run", module, [scope["ShortestCorrect"]()])
    assert module.clock == 2
