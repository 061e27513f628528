# SPDX-License-Identifier: Apache-2.0
"""GSM8K, MATH and the evaluation sets like them: the right columns, no leak, and gold solutions that verify."""

import doctest
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lit_rl.datamodules import EvalSource, GSM8KDataModule, MATHDataModule, TextDataModule, formats, gsm8k, math
from lit_rl.rewards import MathReward
from lit_rl.rewards.latex import match_latex

DATA = Path(os.environ.get("LIT_RL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def shared(*parts: str) -> str:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return str(path)


def write_gsm8k(folder: Path, train: int = 100, test: int = 8) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", train), ("test", test)):
        rows = [
            {"question": f"{split} {i} and 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1:,}"}
            for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def write_math(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem": f"Half of {i}?",
            "level": f"Level {1 + i % 5}",
            "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
        }
        for i in range(50)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({**rows[3], "problem": "?", "answer": r"\frac{3}{2}", "level": 4}))
    return str(folder)


def prompts(records: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(r["prompt"]) for r in records}


# GSM8K --------------------------------------------------------------------------------------------------------------


def test_gsm8k_gives_problem_answer_and_solution(tmp_path: Path) -> None:
    data = GSM8KDataModule(write_gsm8k(tmp_path))
    data.setup("test")
    record = data.eval_sets[0].stream.draw(3)
    assert (record["problem"], record["answer"], record["solution"]) == ("test 3 and 1?", "4", "3 + 1 = 4.")
    assert (record["source"], data.eval_sets[0].name) == ("gsm8k", "gsm8k")
    [message] = record["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("test 3 and 1?\n\n")
    assert message["content"].endswith("within \\boxed{}.")


def test_the_template_may_be_a_text_for_base_models(tmp_path: Path) -> None:
    data = GSM8KDataModule(write_gsm8k(tmp_path), template="Question: {problem}\nAnswer:")
    data.setup("test")
    assert data.eval_sets[0].stream.draw(0)["prompt"] == "Question: test 0 and 1?\nAnswer:"


def test_validation_is_held_out_of_the_training_problems_and_the_test_problems_are_for_the_end(tmp_path: Path) -> None:
    data = GSM8KDataModule(write_gsm8k(tmp_path, train=200), held_out=0.2, samples=4, temperature=0.5)
    data.setup("fit")
    [held_out] = data.eval_sets
    train = data.train_stream.at(0, data.train_stream.size or 0)
    held = held_out.stream.at(0, len(held_out))
    assert len(train) + len(held) == 200
    assert not prompts(train) & prompts(held)
    assert 0.1 < len(held) / 200 < 0.3
    assert all(r["problem"].startswith("train") for r in held)
    assert (held_out.samples, held_out.temperature) == (4, 0.5)
    data.setup("test")
    assert [(s.name, len(s), s.samples) for s in data.eval_sets] == [("gsm8k", 8, 4)]


def test_without_a_held_out_part_the_test_problems_validate(tmp_path: Path) -> None:
    data = GSM8KDataModule(write_gsm8k(tmp_path), held_out=0, limit=10, val_limit=3)
    data.setup("fit")
    assert data.train_stream.size == 10
    assert [r["problem"] for r in data.eval_sets[0].stream.at(0, 3)] == [f"test {i} and 1?" for i in range(3)]
    assert len(data.eval_sets[0]) == 3
    with pytest.raises(ValueError, match=r"held_out is a share .* must be in \[0, 1\), got 1"):
        GSM8KDataModule(held_out=1)


def test_further_sets_join_validation_and_test(tmp_path: Path) -> None:
    path = write_gsm8k(tmp_path)
    more = EvalSource(path, name="more", map=formats.gsm8k, samples=2, max_tokens=9)
    data = GSM8KDataModule(path, val=[more], test=[more])
    for stage in ("fit", "test"):
        data.setup(stage)
        assert [(s.name, s.samples, s.max_tokens) for s in data.eval_sets] == [("gsm8k", 1, None), ("more", 2, 9)]
        assert data.eval_sets[1].stream.draw(0)["prompt"][0]["content"].startswith("test 0 and 1?\n\nPlease reason")


def test_demonstrations_end_as_the_prompt_asks_and_are_for_training_only(tmp_path: Path) -> None:
    data = GSM8KDataModule(write_gsm8k(tmp_path), demonstrations=True)
    data.setup("fit")
    record = data.train_stream.draw(0)
    assert record["completion"] == f"{record['solution']}\nThe answer is \\boxed{{{record['answer']}}}."
    assert MathReward().verify(record["completion"], record["answer"]) == 1
    assert "completion" not in data.eval_sets[0].stream.columns()


def test_a_row_that_is_not_of_gsm8k_is_refused_with_its_place(tmp_path: Path) -> None:
    path = Path(write_gsm8k(tmp_path))
    (path / "train.jsonl").write_text('{"question": "1?", "answer": "1"}')
    with pytest.raises(ValueError, match="not in the format of GSM8K") as caught:
        GSM8KDataModule(str(path)).setup("fit")
    assert "train.jsonl, line 1" in caught.value.__notes__[0]


# MATH ---------------------------------------------------------------------------------------------------------------


def test_math_reads_the_answer_from_its_column_or_its_box(tmp_path: Path) -> None:
    data = MATHDataModule(write_math(tmp_path), write_math(tmp_path), held_out=0.2)
    data.setup("fit")
    for record in data.train_stream.at(0, 10):
        number = record["problem"].split()[-1][:-1]
        assert record["answer"] == f"\\frac{{{number}}}{{2}}"
    assert {r["source"] for r in data.eval_sets[0].stream.at(0, 3)} == {"math"}
    data.setup("test")
    assert data.eval_sets[0].name == "math500"
    assert data.eval_sets[0].stream.draw(0)["answer"] == r"\frac{3}{2}"


def test_math_can_be_limited_to_some_levels(tmp_path: Path) -> None:
    data = MATHDataModule(write_math(tmp_path), held_out=0, levels=[4, 5], demonstrations=True)
    records = data.train.records() if data.train else []
    assert {r["level"] for r in records} == {"Level 4", "Level 5"}
    assert len(records) == 20
    assert records[0]["completion"] == records[0]["solution"]
    with pytest.raises(ValueError, match=r"levels of MATH go from 1 to 5, got \[6\]"):
        MATHDataModule(levels=[6])


def test_a_solution_without_a_box_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a column 'answer' nor"):
        formats.math({"problem": "1+1?", "solution": "It is 2."})


# The public sets ----------------------------------------------------------------------------------------------------


def test_all_of_gsm8k_loads_and_every_gold_solution_is_right() -> None:
    data = GSM8KDataModule(shared("gsm8k"), demonstrations=True)
    data.setup("fit")
    size = data.train_stream.size or 0
    assert size + len(data.eval_sets[0]) == 7473
    reward = MathReward()
    for record in data.train_stream.at(0, size):
        assert reward.verify(record["completion"], record["answer"]) == 1, record
        assert "<<" not in record["solution"]
    data.setup("test")
    assert len(data.eval_sets[0]) == 1319
    for record in data.eval_sets[0].stream.at(0, 1319):
        assert reward.verify(f"{record['solution']}\n#### {record['answer']}", record["answer"]) == 1, record


def test_all_of_math500_loads_and_every_gold_solution_is_right() -> None:
    pytest.importorskip("math_verify")
    path = shared("math500")
    data = MATHDataModule(f"{path}/test.jsonl", path, held_out=0, demonstrations=True)
    data.setup("test")
    assert len(data.eval_sets[0]) == 500
    for record in data.eval_sets[0].stream.at(0, 500):
        assert match_latex(record["solution"], record["answer"]) == 1, record["unique_id"]


def test_sets_of_several_formats_are_evaluated_side_by_side() -> None:
    val = [
        EvalSource(shared("svamp"), map=formats.svamp, limit=500),
        EvalSource(shared("aime24", "test.jsonl"), name="aime24", map=formats.math, samples=32, temperature=0.6),
        EvalSource(shared("amc23"), map=formats.math, samples=4),
    ]
    data = TextDataModule(val=val, template=gsm8k.BOXED)
    data.setup("validate")
    assert [(s.name, len(s), s.samples) for s in data.eval_sets] == [
        ("svamp", 500, 1),
        ("aime24", 30, 32),
        ("amc23", 40, 4),
    ]
    reward = MathReward()
    for eval_set in data.eval_sets:
        for record in eval_set.stream.at(0, len(eval_set)):
            assert isinstance(record["answer"], str)
            assert reward.verify(f"\\boxed{{{record['answer']}}}", record["answer"]) == 1
            assert reward.verify(f"\\boxed{{{float(record['answer']) + 1}}}", record["answer"]) == 0


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (gsm8k, math):
        assert doctest.testmod(module).failed == 0
