# SPDX-License-Identifier: Apache-2.0
"""The position in the data belongs to the method: training, validating and resuming draw each prompt once."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lit_rl.data import EvalSet, ListStream, PromptDataModule
from lit_rl.prompts import PromptEncoder
from lit_rl.testing import StopAt, make_module, make_policy, train


class Sums(PromptDataModule):
    """A short list, so that a run goes through several epochs."""

    def __init__(self, seed: int = 0, answer: str = "1", long: int = 0) -> None:
        super().__init__()
        self.seed, self.answer, self.long = seed, answer, long

    def build(self, stage: str) -> None:
        rows = [{"prompt": f"{i}+1=", "answer": self.answer} for i in range(6)]
        rows += [{"prompt": "1+" * 20 + f"{i}=", "answer": self.answer} for i in range(self.long)]
        self.train_stream = ListStream(rows, self.seed)
        self.eval_sets = [EvalSet("sums", ListStream(rows, shuffle=False), limit=3)]


class Drawn(Callback):
    """Remembers what each step was trained on."""

    def __init__(self) -> None:
        self.draws: list[list[int]] = []
        self.texts: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        prompts = pl_module.last_rollouts.prompts
        self.draws.append(prompts.draw.tolist())
        self.texts += prompts.text


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy")


def test_a_run_goes_through_the_stream_without_gaps_also_where_it_validates(tmp_path: Path, policy: Path) -> None:
    drawn, module = Drawn(), make_module(policy, max_rollouts=5)
    train(tmp_path, module, [drawn], data=Sums(), limit_val_batches=1, val_check_interval=2)
    assert [d for draws in drawn.draws for d in draws] == list(range(20))
    assert module.cursor == 20
    stream = ListStream([{"prompt": f"{i}+1="} for i in range(6)])
    assert drawn.texts == [r["prompt"] for r in stream.at(0, 20)]


def test_a_resumed_run_goes_on_with_the_next_prompt(tmp_path: Path, policy: Path) -> None:
    before, after = Drawn(), Drawn()
    train(tmp_path, make_module(policy, max_rollouts=5), [before, StopAt(2)], data=Sums())
    saved = tmp_path / "checkpoints" / "clock00000002.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resuming with")
        train(tmp_path, make_module(policy, max_rollouts=5), [after], checkpoint=saved, data=Sums())
    assert before.draws == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert after.draws == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize("changed", [{"answer": "2"}, {"seed": 1}, {"long": 1}])
def test_resuming_on_other_data_is_warned_about(tmp_path: Path, policy: Path, changed: dict[str, Any]) -> None:
    train(tmp_path, make_module(policy, max_rollouts=3), [StopAt(1)], data=Sums())
    saved = tmp_path / "checkpoints" / "clock00000001.ckpt"
    with pytest.warns(UserWarning, match=r"Resuming with data=.* but the checkpoint was written with data="):
        train(tmp_path, make_module(policy, max_rollouts=2), checkpoint=saved, data=Sums(**changed))


def test_prompts_beyond_the_budget_are_replaced_and_counted(tmp_path: Path, policy: Path) -> None:
    def dropping(tokenizer: Any, **options: Any) -> PromptEncoder:
        return PromptEncoder(tokenizer, overlong="drop", **options)

    drawn = Drawn()
    module = make_module(policy, max_rollouts=3, max_prompt_tokens=10, encoder=dropping)
    with pytest.warns(UserWarning, match="more than max_prompt_tokens=10, and is left out"):
        train(tmp_path, module, [drawn], data=Sums(long=6))
    assert [len(draws) for draws in drawn.draws] == [4, 4, 4]
    assert all(len(text) == 4 for text in drawn.texts)
    assert module.cursor > 12
    assert module.encoder.dropped == module.cursor - 12
