# SPDX-License-Identifier: Apache-2.0
"""Texts that YAML could mistake for something else arrive as they were written."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from jsonargparse import ArgumentParser

import lit_rl.rewards as rewards
from lit_rl.cli import keep_comments_as_text
from lit_rl.lightning_cli import LitRLCLI
from lit_rl.policies import Policy
from lit_rl.prompts import PromptEncoder
from lit_rl.rewards import Reward
from lit_rl.samplers import Sampling

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = ("#", "###", "# Title", "# Title\n# Text", "yes", "12", "[", "{% if x %}", "- a", "a: b", "\n\n", "")


def text_arguments() -> Iterator[tuple[type, str]]:
    """Every argument of every reward, of the policy, the encoder and the sampling settings that may be a text."""
    exported = (getattr(rewards, name) for name in rewards.__all__)
    classes = {c for c in exported if inspect.isclass(c) and issubclass(c, Reward) and not inspect.isabstract(c)}
    for cls in (*sorted(classes, key=lambda c: c.__name__), Policy, PromptEncoder, Sampling):
        for name, hint in get_type_hints(cls.__init__).items():
            if hint is str or str in get_args(hint):
                yield cls, name


CASES = list(text_arguments())


@pytest.fixture(autouse=True)
def _as_the_command_line() -> None:
    keep_comments_as_text()


def read(cls: type, name: str, value: Any, from_file: bool = True) -> Any:
    """The value of an argument after it was parsed, from a configuration or from the command line."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", fail_untyped=False, skip={"tokenizer"} if cls is PromptEncoder else set())
    required = {"path": "p", "pattern": "p", "function": "builtins.len", "buffer": 1}
    known = inspect.signature(cls).parameters
    given = {k: v for k, v in required.items() if k in known} | {name: value}
    if from_file:
        return parser.parse_string(yaml.safe_dump({"x": given})).x[name]
    return parser.parse_args([f"--x.{k}={v}" for k, v in given.items()]).x[name]


def test_there_are_arguments_to_test():
    assert ("ExactMatchReward", "marker") in {(c.__name__, n) for c, n in CASES}
    assert len(CASES) > 15


@pytest.mark.parametrize(("cls", "name"), CASES, ids=[f"{c.__name__}.{n}" for c, n in CASES])
def test_a_text_argument_takes_any_text(cls: type, name: str):
    listed = get_type_hints(cls.__init__)[name] in (list[str], Sequence[str])
    for text in TEXTS:
        value = [text] if listed else text
        assert read(cls, name, value) == value, repr(text)


def test_markers_and_titles_arrive_from_the_command_line_too():
    for text in ("#", "###", "# Title"):
        assert read(Policy, "chat_template", text, from_file=False) == text
        assert read(rewards.ExactMatchReward, "marker", text, from_file=False) == text


def test_nothing_is_still_none_where_none_is_allowed():
    for text in ("null", "~"):
        assert read(Policy, "chat_template", text, from_file=False) is None
    assert read(Policy, "chat_template", None) is None


class ParseOnly(LitRLCLI):
    """The command line up to the point where objects are made."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


@pytest.mark.parametrize("word", ["null", "None"])
@pytest.mark.parametrize("key", ["divergence.entry_clip", "divergence", "max_prompt_tokens"])
def test_nothing_can_be_said_at_any_depth_of_the_command_line(key: str, word: str):
    """jsonargparse 4.53 hands a null on to nested parsers as the text None."""
    configs = [f"--config={CONFIGS / name}" for name in ("quickstart.yaml", "methods/opsd.yaml")]
    parser = ParseOnly(configs, run=False).parser
    assert parser.parse_args([*configs, f"--model.{key}={word}"]).model.init_args[key] is None
