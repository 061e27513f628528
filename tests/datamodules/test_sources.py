# SPDX-License-Identifier: Apache-2.0
"""Rows become records: renamed, mapped, filtered, made into prompts, divided and counted off."""

import doctest
import warnings
from pathlib import Path
from typing import Any

import pytest
from inputs_data import rows_file

from lit_rl.data import PromptDataModule
from lit_rl.datamodules import EvalSource, Source, TextDataModule, formats, sources

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1), "level": i % 3} for i in range(6)]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return rows_file(tmp_path / "sums.jsonl", ROWS)


def even(record: dict[str, Any]) -> bool:
    return int(record["answer"]) % 2 == 0


def louder(record: dict[str, Any]) -> dict[str, Any] | None:
    return None if record["level"] == 2 else {**record, "prompt": record["prompt"] + "!"}


# From row to record -------------------------------------------------------------------------------------------------


def test_columns_are_renamed_and_all_others_passed_on(table: str) -> None:
    records = Source(table, columns={"prompt": "question"}).records()
    assert records == [{"prompt": r["question"], "answer": r["answer"], "level": r["level"]} for r in ROWS]


def test_renaming_reaches_into_dictionaries_and_may_swap() -> None:
    row = {"a": 1, "b": 2, "meta": {"gold": {"value": 3}}, "x.y": 4}
    assert sources.rename(row, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "meta": row["meta"], "x.y": 4}
    assert sources.rename(row, {"answer": "meta.gold.value", "y": "x.y"})["answer"] == 3
    assert sources.rename(row, {"y": "x.y"})["y"] == 4
    for missing in ("c", "meta.silver", "a.b"):
        with pytest.raises(KeyError, match=missing):
            sources.rename(row, {"new": missing})


def test_the_order_is_rename_map_filter_template(table: str) -> None:
    source = Source(
        table, columns={"prompt": "question"}, map=louder, filters=[even], template="Q: {prompt} ({level}) \\boxed{}"
    )
    assert [r["prompt"] for r in source.records()] == [
        "Q: 1+1?! (1) \\boxed{}",
        "Q: 3+1?! (0) \\boxed{}",
    ]


def test_a_template_of_messages_gives_messages(table: str) -> None:
    template = [{"role": "system", "content": "Add."}, {"role": "user", "content": "{question}"}]
    record = Source(table, template=template).records()[0]
    assert record["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "0+1?"}]
    assert template[1]["content"] == "{question}"


def test_values_in_a_template_are_not_templates_themselves(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows.jsonl", [{"q": "what is {answer}?", "answer": "secret"}])
    assert Source(file, template="{q}").records()[0]["prompt"] == "what is {answer}?"


def test_prompts_may_be_chat_messages_already(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert Source(rows_file(tmp_path / "rows.jsonl", [{"prompt": messages}])).records()[0]["prompt"] == messages


def test_the_limit_counts_what_is_kept_and_stops_reading(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows.jsonl", [*({"prompt": "p", "answer": str(i)} for i in range(6)), "broken"])
    assert [r["answer"] for r in Source(file, filters=[even], limit=2).records()] == ["0", "2"]
    with pytest.raises(ValueError, match="line 7"):
        Source(file, filters=[even], limit=4).records()


def test_records_know_their_source(table: str, tmp_path: Path) -> None:
    columns = {"prompt": "question"}
    assert Source(table, columns=columns).stream().draw(0)["source"] == "sums"
    assert Source(table, columns=columns, name="mine").stream().draw(0)["source"] == "mine"
    assert Source("openai/gsm8k").label == "gsm8k"
    assert Source("data/part-*.jsonl").label == "part-"
    own = rows_file(tmp_path / "own.jsonl", [{"prompt": "p", "source": "theirs"}])
    assert Source(own).stream().draw(0)["source"] == "theirs"
    assert Source(own, name="mine").stream().draw(0)["source"] == "mine"


# Division -----------------------------------------------------------------------------------------------------------


def test_parts_divide_a_table_without_overlap_also_where_prompts_repeat(tmp_path: Path) -> None:
    rows = [{"prompt": f"problem {i % 400}", "row": i} for i in range(1000)]
    file = rows_file(tmp_path / "rows.jsonl", rows)
    parts = [Source(file, part=part).records() for part in ((0.0, 0.7), (0.7, 0.9), (0.9, 1.0))]
    assert sorted(r["row"] for part in parts for r in part) == list(range(1000))
    prompts = [{r["prompt"] for r in part} for part in parts]
    assert not prompts[0] & prompts[1] | prompts[1] & prompts[2] | prompts[0] & prompts[2]
    assert [len(p) / 400 for p in prompts] == pytest.approx([0.7, 0.2, 0.1], abs=0.07)


def test_a_divided_source_keeps_its_settings_and_its_bounds(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows.jsonl", [{"q": f"problem {i}"} for i in range(300)])
    source = Source(file, template="{q}?", part=(0.2, 0.8), limit=100)
    train, held_out = source.divide(0.25, samples=4, limit=10)
    assert train.part == pytest.approx((0.2, 0.65))
    assert held_out.part == pytest.approx((0.65, 0.8))
    assert (held_out.samples, held_out.limit, held_out.template) == (4, 10, "{q}?")
    assert held_out.split == "train"
    assert source.divide(0.25)[1].limit is None  # the limit is that of the training prompts
    kept = {r["prompt"] for r in train.records()}
    assert not kept & {r["prompt"] for r in held_out.records("test")}


# Bad rows -----------------------------------------------------------------------------------------------------------

BAD = ['{"prompt": "a"}', '{"prompt": ', '{"question": "b"}', '{"prompt": null}', '{"prompt": " "}', '{"prompt": "c"}']


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            '{"prompt": ',
            r"line 2 is not valid JSON \(Expecting value at column 11\)\. Correct it, or set malformed='skip'",
        ),
        ("[1]", "line 2 holds list, not a JSON object"),
        ('{"question": "b"}', r"line 2 has no column 'prompt', only \['question'\]; name the right one in `columns`"),
        ('{"prompt": null}', "line 2 has a prompt that is neither text nor a list of messages, but NoneType"),
        ('{"prompt": []}', "line 2 has a prompt that is neither text"),
        ('{"prompt": ["hi"]}', "line 2 has a message in its prompt without 'role' and 'content': 'hi'"),
        ('{"prompt": "  "}', "line 2 has an empty prompt"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, row: str, complaint: str) -> None:
    file = rows_file(tmp_path / "train.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(ValueError, match=complaint):
        Source(file).records()


def test_malformed_rows_may_be_left_out_and_are_counted(tmp_path: Path) -> None:
    source = Source(rows_file(tmp_path / "train.jsonl", BAD), malformed="skip")
    with pytest.warns(UserWarning, match=r"4 malformed row\(s\) of .*train\.jsonl were left out; the first: .*line 2"):
        assert [r["prompt"] for r in source.records()] == ["a", "c"]
    assert source.skipped == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Source(rows_file(tmp_path / "good.jsonl", ROWS), columns={"prompt": "question"}, malformed="skip").records()


def test_a_missing_column_names_those_that_there_are(table: str) -> None:
    with pytest.raises(ValueError, match=r"line 1 has no column 'problem', only \['answer', 'level', 'question'\]"):
        Source(table, columns={"prompt": "problem"}).records()
    with pytest.raises(ValueError, match=r"line 1 has no column 'problem' for the template, only"):
        Source(table, template="{problem}").records()
    with pytest.raises(ValueError, match=r"Every row is malformed: .*line 1 has no column 'problem'"):
        Source(table, columns={"prompt": "problem"}, malformed="skip").records()


def test_a_source_that_gives_nothing_says_so(tmp_path: Path, table: str) -> None:
    for source in (Source(rows_file(tmp_path / "empty.jsonl", [])), Source(table, filters=[lambda record: False])):
        with pytest.raises(ValueError, match="gives no records: check its split, filters and part"):
            source.records()


def test_an_error_in_a_users_function_says_at_which_row(table: str) -> None:
    def fails(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "prompt": 1 / (record["level"] - 1)}

    with pytest.raises(ZeroDivisionError) as caught:
        Source(table, map=fails, filters=[lambda record: record["level"] == 1]).records()
    assert "line 2" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit of x.jsonl must be at least 1"),
        ({"part": (0.5, 0.5)}, "part of x.jsonl must be"),
        ({"part": (0.5, 1.5)}, "part of x.jsonl must be"),
        ({"malformed": "ignore"}, "malformed must be 'error' or 'skip'"),
        ({"samples": 0}, "samples of the evaluation set 'x' must be at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_senseless_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSource("x.jsonl", **options)


# The datamodule -----------------------------------------------------------------------------------------------------


def module(table: str, **options: Any) -> TextDataModule:
    columns = {"prompt": "question"}
    defaults: dict[str, Any] = {
        "train": Source(table, columns=columns),
        "val": [EvalSource(table, columns=columns, name="one", limit=2)],
    }
    return TextDataModule(**{**defaults, **options})


def test_training_is_shuffled_by_the_seed_and_evaluation_keeps_the_order(table: str) -> None:
    orders = set()
    for seed in range(5):
        data = module(table, seed=seed)
        data.setup("fit")
        orders.add(tuple(r["answer"] for r in data.train_stream.at(0, 6)))
    assert len(orders) == 5
    assert [data.eval_sets[0].stream.draw(i)["answer"] for i in range(2)] == ["1", "2"]


def test_evaluation_sets_have_their_own_prompts_and_sampling(table: str) -> None:
    columns = {"prompt": "question"}
    val = [
        EvalSource(table, columns=columns, name="greedy", temperature=0.0, max_tokens=5),
        EvalSource(table, columns=columns, name="sampled", samples=8, temperature=0.7, top_p=0.9, limit=3),
    ]
    data = module(table, val=val, test=[EvalSource(table, columns=columns, name="final")])
    data.setup("fit")
    greedy, sampled = data.eval_sets
    assert (len(greedy), greedy.samples, greedy.temperature, greedy.top_p, greedy.max_tokens) == (6, 1, 0.0, None, 5)
    assert (len(sampled), sampled.samples, sampled.temperature, sampled.top_p) == (3, 8, 0.7, 0.9)
    assert sampled.max_tokens is None
    for stage, names in (("validate", ["greedy", "sampled"]), ("test", ["final"]), ("predict", ["final"])):
        data.setup(stage)
        assert [s.name for s in data.eval_sets] == names


def test_the_template_of_the_module_is_that_of_sources_without_one(table: str) -> None:
    val = [EvalSource(table, name="own", template="own {question}"), EvalSource(table, name="common")]
    data = TextDataModule(Source(table), val, template="common {question}")
    data.setup("fit")
    assert data.train_stream.draw(0)["prompt"].startswith("common ")
    assert [s.stream.draw(0)["prompt"] for s in data.eval_sets] == ["own 0+1?", "common 0+1?"]


def test_a_module_may_only_train_or_only_evaluate_but_not_nothing(table: str) -> None:
    only_trains = module(table, val=[])
    only_trains.setup("fit")
    assert only_trains.val_dataloader() == []
    only_evaluates = module(table, train=None)
    only_evaluates.setup("validate")
    with pytest.raises(ValueError, match="nothing to train on"):
        only_evaluates.setup("fit")
    with pytest.raises(ValueError, match="needs a source"):
        TextDataModule()


def test_only_the_hub_is_prepared_in_advance(table: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sources, "load_dataset", lambda *args: asked.append(args))
    (tmp_path / "folder").mkdir()
    hub = EvalSource("owner/name", subset="main", revision="abc")
    data = module(
        table, val=[hub, EvalSource(str(tmp_path / "folder"), name="local")], test=[EvalSource("owner/other")]
    )
    data.prepare_data()
    assert asked == [("owner/name", "test", "main", "abc"), ("owner/other", "test", None, None)]
    assert isinstance(data, PromptDataModule)


def test_everything_can_be_said_in_yaml(table: str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(PromptDataModule, "data")
    text = f"""
data:
  class_path: lit_rl.datamodules.TextDataModule
  init_args:
    train:
      path: {table}
      columns: {{problem: question}}
      filters: [math.isfinite]
      map: lit_rl.datamodules.formats.math
      part: [0, 0.9]
    val:
      - {{path: {table}, map: lit_rl.datamodules.formats.math, name: held-out, samples: 4, temperature: 0.6}}
      - path: {table}
        name: continued
        map:
          class_path: lit_rl.datamodules.formats.Continuation
          init_args: {{column: question, head: 2}}
        max_tokens: 16
    template:
      - {{role: user, content: "{{problem}}"}}
"""
    data = parser.instantiate(parser.parse_string(text)).data
    assert data.train.map is formats.math
    assert data.train.filters == [__import__("math").isfinite]
    assert data.train.part == (0, 0.9)
    assert [(s.name, s.samples, s.temperature, s.max_tokens) for s in data.val] == [
        ("held-out", 4, 0.6, None),
        ("continued", 1, None, 16),
    ]
    assert data.val[1].map == formats.Continuation("question", 2)
    assert data.val[0].eval_set().stream.draw(0)["prompt"] == [{"role": "user", "content": "0+1?"}]


def test_the_examples_in_the_docstrings_hold() -> None:
    for module_ in (sources, formats):
        assert doctest.testmod(module_).failed == 0
