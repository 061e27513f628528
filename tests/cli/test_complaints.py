# SPDX-License-Identifier: Apache-2.0
"""A mistake in a configuration ends with status 2 and one sentence; a bug shows its trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rl.cli import main
from lit_rl.complaints import explain
from lit_rl.hooks import RolloutCallback
from lit_rl.mistakes import is_for_the_user, plain_errors
from lit_rl.rewards import Reward

BASE: dict[str, Any] = {
    "model": {
        "class_path": "lit_rl.GRPO",
        "init_args": {
            "policy": {"path": "a/policy"},
            "rewards": [{"class_path": "lit_rl.rewards.ExactMatchReward"}],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"class_path": "lit_rl.datamodules.ArithmeticDataModule", "init_args": {"val_size": 4}},
    "trainer": {"logger": False},
}


class Broken(RolloutCallback):
    """A callback with a bug."""

    def __init__(self) -> None:
        self.nothing.at_all  # type: ignore[attr-defined]  # noqa: B018


class Unfinished(Reward):
    """An abstract class."""


def run(folder: Path, changes: dict[str, Any], capsys: Any, *options: str) -> str:
    """What the user sees for a configuration with some changes (dotted keys; None removes the key)."""
    config = copy.deepcopy(BASE)
    for key, value in changes.items():
        *parents, last = key.split(".")
        at = config
        for parent in parents:
            at = at.setdefault(parent, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(file), f"--trainer.default_root_dir={folder / 'run'}", *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message.splitlines()[0]


A = "model.init_args"
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "argument of the method": (
        {f"{A}.group_sise": 4},
        "model: lit_rl.GRPO has no argument 'group_sise'. Did you mean group_size?",
    ),
    "argument with parts of its own": (
        {f"{A}.samplng": {"temperature": 0.5}},
        "model: lit_rl.GRPO has no argument 'samplng'. Did you mean sampling?",
    ),
    "null where numbers must be": (
        {"data": {"class_path": "lit_rl.datamodules.ArithmeticDataModule", "init_args": {"digits": None}}},
        "digits of ArithmeticDataModule must be tuple[int, int], got null.",
    ),
    "null deep inside": ({f"{A}.sampling": {"min_p": None}}, "min_p of Sampling must be float, got null."),
    "argument of a reward": (
        {f"{A}.rewards": [{"class_path": "lit_rl.rewards.ExactMatchReward", "init_args": {"nme": "x"}}]},
        "model.rewards: lit_rl.rewards.ExactMatchReward has no argument 'nme'. Did you mean name?",
    ),
    "argument of the policy": (
        {f"{A}.policy": {"path": "x", "dtyp": "float32"}},
        "policy of lit_rl.GRPO has no key 'dtyp'. Did you mean dtype?",
    ),
    "argument of an optimizer": (
        {f"{A}.optimizer.init_args": {"weightdecay": 1}},
        "model.optimizer: torch.optim.AdamW has no argument 'weightdecay'. Did you mean weight_decay?",
    ),
    "class of the method": (
        {"model.class_path": "lit_rl.GRPOO"},
        "model: there is no lit_rl.GRPOO. Did you mean lit_rl.GRPO?",
    ),
    "class of a reward": (
        {f"{A}.rewards": [{"class_path": "lit_rl.rewards.Exact"}]},
        "model.rewards: there is no lit_rl.rewards.Exact. Did you mean lit_rl.rewards.ExactMatchReward?",
    ),
    "abstract class": (
        {f"{A}.rewards": [{"class_path": "tests.cli.test_complaints.Unfinished"}]},
        "model.rewards: names an abstract class; choose one of its subclasses.",
    ),
    "module": ({"model.class_path": "lit_rll.GRPO"}, "model: No module named 'lit_rll'"),
    "no class": (
        {"model.class_path": None},
        "model: class_path is missing: it names the LightningModule that the init_args belong to.",
    ),
    "key of the trainer": (
        {"trainer.max_stepss": 4},
        "There is no key trainer.max_stepss. Did you mean trainer.max_steps?",
    ),
    "type": ({f"{A}.group_size": "many"}, "model.group_size: must be int, got 'many'."),
    "choice": ({f"{A}.on_nonfinite": "stop"}, "model.on_nonfinite: must be one of error, skip, got 'stop'."),
    "member": (
        {f"{A}.aggregation": "token"},
        "must be one of token_mean, sequence_mean, sequence_sum, constant, got 'token'.",
    ),
    "value": ({f"{A}.prompts_per_step": 0}, "lit-rl fit: prompts_per_step must be at least 1, got 0."),
    "group of one": ({f"{A}.group_size": 1}, "lit-rl fit: group_size=1 leaves nothing to compare with"),
    "no reference": ({f"{A}.kl_coef": 0.1}, "lit-rl fit: kl_coef is set but there is no reference policy"),
    "no policy folder": ({f"{A}.policy": {"path": "./no/where"}}, "There is no folder ./no/where"),
    "name at the top": ({"modle": {"class_path": "lit_rl.GRPO"}}, "There is no key modle. Did you mean model?"),
    "argument at the top": (
        {"max_rollouts": 4},
        "There is no key max_rollouts. Did you mean model.init_args.max_rollouts?",
    ),
    "argument beside init_args": (
        {"model.max_rollouts": 4},
        "model: max_rollouts must stand inside init_args of lit_rl.GRPO, not beside class_path.",
    ),
    "argument of a reward beside its class": (
        {f"{A}.rewards": [{"class_path": "lit_rl.rewards.ExactMatchReward", "marker": "#"}]},
        "model.rewards: marker must stand inside init_args of lit_rl.rewards.ExactMatchReward, not beside class_path.",
    ),
    "argument of an optimizer beside its class": (
        {f"{A}.optimizer": {"class_path": "torch.optim.AdamW", "lr": 1e-3}},
        "model.optimizer: lr must stand inside init_args of torch.optim.AdamW, not beside class_path.",
    ),
    "argument of a callback beside its class": (
        {"trainer.callbacks": [{"class_path": "lit_rl.callbacks.RolloutLogger", "every": 2}]},
        "trainer.callbacks: every must stand inside init_args of lit_rl.callbacks.RolloutLogger",
    ),
    "init_args misspelt": (
        {"data": {"class_path": "lit_rl.datamodules.ArithmeticDataModule", "initargs": {}}},
        "data: there is no key 'initargs' beside class_path. Did you mean init_args?",
    ),
    "function for a reward": (
        {f"{A}.rewards": [{"class_path": "lit_rl.testing.toys.starts_with_digit"}]},
        "model.rewards: lit_rl.testing.toys.starts_with_digit is a function, not a class: write class_path: "
        "lit_rl.rewards.FunctionReward with init_args: {function: lit_rl.testing.toys.starts_with_digit}.",
    ),
    "function for a callback": (
        {"trainer.callbacks": [{"class_path": "lit_rl.testing.toys.make_module"}]},
        "lit_rl.testing.toys.make_module is a function, not a class: class_path must name a subclass of Callback.",
    ),
    "class of another kind": (
        {f"{A}.rewards": [{"class_path": "lit_rl.samplers.HFSampler"}]},
        "model.rewards: lit_rl.samplers.HFSampler is no Reward: class_path must name a subclass of Reward.",
    ),
    "class without its module": (
        {f"{A}.sampler": "HFSamplr"},
        "model.sampler: 'HFSamplr' is no class path. Did you mean lit_rl.samplers.HFSampler?",
    ),
    "nothing like a class": (
        {f"{A}.sampler": "xyzzy"},
        "model.sampler: 'xyzzy' is no class path. One looks like package.module.Class.",
    ),
    "type of an optimizer's argument": (
        {f"{A}.optimizer.init_args.lr": "abc"},
        "model.optimizer.lr: must be float, got 'abc'.",
    ),
    "unreadable column": (
        {f"{A}.rewards": [{"class_path": "lit_rl.rewards.MathReward", "init_args": {"answer_column": "gold"}}]},
        "lit-rl fit: Reward 'math' reads the column 'gold', but the data has only ['a', 'answer', 'b'].",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_sentence_that_says_what_to_change(name: str, tmp_path: Path, capsys: Any):
    changes, sentence = MISTAKES[name]
    assert sentence in run(tmp_path, changes, capsys)


def test_a_refused_run_leaves_no_configuration_behind(tmp_path: Path, capsys: Any):
    run(tmp_path, {f"{A}.policy": {"path": "./no/where"}}, capsys)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_file_that_does_not_exist_and_one_that_is_no_yaml(tmp_path: Path, capsys: Any):
    for content, sentence in ((None, "File does not exist"), ("model:\n  - a\n b: [", "line 3")):
        file = tmp_path / "c.yaml"
        if content is not None:
            file.write_text(content)
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(file)])
        assert sentence in capsys.readouterr().err


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path, capsys: Any):
    (good := tmp_path / "good.yaml").write_text(yaml.safe_dump(BASE))
    (bad := tmp_path / "bad.yaml").write_text("model:\n  - a\n b: [")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(good), "--config", str(bad)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"lit-rl fit: {bad} is not valid YAML in line 3, column 2: did not find expected key while parsing a block "
        "mapping.\n"
    )


def test_options_that_lack_their_place_or_their_module_are_short_messages(tmp_path: Path, capsys: Any):
    (file := tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    for option, sentence in {
        "--optimizer.init_args.lr=1": "There is no option --optimizer.init_args.lr. Did you mean "
        "--model.init_args.optimizer.init_args.lr?",
        "--model.init_args.optimizer.init_args.lr=abc": "model.optimizer.lr: must be float, got 'abc'.",
        "--model.init_args.sampler=HFSamplr": "model.sampler: 'HFSamplr' is no class path. Did you mean "
        "lit_rl.samplers.HFSampler?",
        "--model=GRPOO": "model: 'GRPOO' is no class path. Did you mean lit_rl.GRPO?",
    }.items():
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(file), option])
        assert capsys.readouterr().err == f"lit-rl fit: {sentence}\n"


def test_a_dataset_that_the_hub_does_not_give_is_a_sentence(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = run(tmp_path, {"data": {"class_path": "lit_rl.datamodules.GSM8KDataModule"}}, capsys, "--print_plan")
    assert "Cannot load openai/gsm8k from the Hugging Face hub (Couldn't reach 'openai/gsm8k' on the Hub)" in message
    assert "name a local file or folder in `path`." in message


def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(capsys: Any):
    with pytest.raises(SystemExit) as stopped:
        main(["vlaidate"])
    assert stopped.value.code == 2
    assert "lit-rl vlaidate: there is no such command. Did you mean validate?" in capsys.readouterr().err


def test_an_option_that_does_not_exist_is_answered_with_the_one_that_was_meant(capsys: Any):
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.max_stepss=3"])
    assert capsys.readouterr().err == (
        "lit-rl fit: There is no option --trainer.max_stepss. Did you mean --trainer.max_steps?\n"
    )


def test_a_bug_shows_its_own_trace_and_not_that_of_the_parser(tmp_path: Path):
    config = {**BASE, "trainer": {"callbacks": [{"class_path": "tests.cli.test_complaints.Broken"}]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'nothing'"):
        main(["fit", "--config", str(tmp_path / "c.yaml")])


def raised_by(function: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_what_is_for_the_user_is_raised_on_purpose_by_the_package():
    from lit_rl.metrics import pass_at_k
    from lit_rl.policies.loading import local_path

    def foreign() -> None:
        raise ValueError("a value that somebody else does not like")

    def misconfigured() -> None:
        raise MisconfigurationException("two progress bars")

    assert is_for_the_user(raised_by(lambda: pass_at_k(1, 1, 2)))
    assert is_for_the_user(raised_by(lambda: local_path("./no/where")))
    assert is_for_the_user(raised_by(misconfigured))
    assert not is_for_the_user(raised_by(foreign))
    assert not is_for_the_user(raised_by(lambda: pass_at_k(1, None, 1)))  # type: ignore[arg-type]  # inside the package
    assert not is_for_the_user(raised_by(lambda: int("x")))


def test_the_trace_of_a_mistake_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    from lit_rl.policies.loading import local_path

    with pytest.raises(SystemExit), plain_errors("lit-rl x"):
        local_path("./no/where")
    assert "LIT_RL_TRACEBACK=1 shows where" in capsys.readouterr().err
    monkeypatch.setenv("LIT_RL_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError), plain_errors("lit-rl x"):
        local_path("./no/where")


def test_the_sentence_behind_a_wrapper_of_the_parser_is_found(capsys: Any):
    from lit_rl.policies.loading import local_path

    def as_the_parser_raises() -> None:
        try:
            local_path("./no/where")
        except FileNotFoundError as error:
            raise ValueError("Does not validate against any of the Union subtypes") from error

    with pytest.raises(SystemExit), plain_errors("lit-rl x"):
        as_the_parser_raises()
    assert capsys.readouterr().err.startswith("lit-rl x: There is no folder ./no/where")


def test_a_message_of_unknown_form_stays_as_it_is():
    assert explain("something  else\nhappened") == "something else happened"
