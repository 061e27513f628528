# SPDX-License-Identifier: Apache-2.0
"""A mixture draws from its sources as weighted, names them, and keeps their evaluation sets apart."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from inputs_data import rows_file

from lit_rl.data import PromptDataModule
from lit_rl.datamodules import ArithmeticDataModule, EvalSource, MixtureDataModule, Source, TextDataModule
from lit_rl.rewards import FunctionReward
from lit_rl.testing import ToyData, make_module, make_policy, train


def text(folder: Path, name: str, evaluation: int = 1, **columns: Any) -> TextDataModule:
    path = rows_file(folder / f"{name}.jsonl", [{"prompt": f"{name} {i}", **columns} for i in range(10)])
    val = [EvalSource(path, name=f"set{i}", limit=3) for i in range(evaluation)]
    return TextDataModule(Source(path), val)


def test_every_prompt_knows_its_source_and_sources_come_in_proportion(tmp_path: Path) -> None:
    sources: dict[str, PromptDataModule] = {"a": text(tmp_path, "x"), "sums": ArithmeticDataModule(val_size=4)}
    data = MixtureDataModule(sources, {"a": 1, "sums": 3}, seed=4)
    data.setup("fit")
    records = data.train_stream.at(0, 400)
    assert Counter(r["source"] for r in records) == {"a": 100, "sums": 300}
    assert all((r["source"] == "a") == r["prompt"].startswith("x ") for r in records)
    uniform = MixtureDataModule(sources)
    uniform.setup("fit")
    assert Counter(r["source"] for r in uniform.train_stream.at(0, 400)) == {"a": 200, "sums": 200}


def test_evaluation_sets_carry_the_name_of_their_source(tmp_path: Path) -> None:
    data = MixtureDataModule(
        {"one": text(tmp_path, "x"), "two": text(tmp_path, "y", 2), "none": text(tmp_path, "z", 0)}
    )
    data.setup("validate")
    assert [s.name for s in data.eval_sets] == ["one", "two.set0", "two.set1"]
    assert [{r["source"] for r in s.stream.at(0, len(s))} for s in data.eval_sets] == [{"one"}, {"two"}, {"two"}]
    assert [len(s) for s in data.eval_sets] == [3, 3, 3]


def test_a_source_without_training_data_only_evaluates(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "held.jsonl", [{"prompt": "h"}])
    sources = {"a": text(tmp_path, "x"), "held": TextDataModule(val=[EvalSource(path)])}
    data = MixtureDataModule(sources, weights={"a": 1})
    data.setup("fit")
    assert {r["source"] for r in data.train_stream.at(0, 20)} == {"a"}
    assert [s.name for s in data.eval_sets] == ["a", "held"]
    with pytest.raises(ValueError, match=r"exactly the sources \['a'\]"):
        MixtureDataModule(sources, weights={"a": 1, "held": 1}).setup("fit")
    with pytest.raises(ValueError, match="nothing to train on"):
        MixtureDataModule({"held": sources["held"]}).setup("fit")
    with pytest.raises(ValueError, match="at least one source"):
        MixtureDataModule({})


def test_mixtures_nest(tmp_path: Path) -> None:
    inner = MixtureDataModule({"a": text(tmp_path, "x"), "b": text(tmp_path, "y")})
    outer = MixtureDataModule({"inner": inner, "c": text(tmp_path, "z")}, {"inner": 2, "c": 1})
    outer.setup("fit")
    assert Counter(r["source"] for r in outer.train_stream.at(0, 30)) == {"inner": 20, "c": 10}
    assert [s.name for s in outer.eval_sets] == ["inner.a", "inner.b", "c"]


def test_downloads_of_all_sources_are_prepared() -> None:
    prepared = []

    class Hub(ToyData):
        def prepare_data(self) -> None:
            prepared.append(self.seed)

    MixtureDataModule({"a": Hub(1), "b": Hub(2)}).prepare_data()
    assert prepared == [1, 2]


def test_a_mixture_can_be_said_in_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    path = rows_file(tmp_path / "x.jsonl", [{"prompt": "x", "completion": "y"}])
    parser = ArgumentParser()
    parser.add_subclass_arguments(PromptDataModule, "data")
    toys = {"class_path": "lit_rl.testing.ToyData", "init_args": {"seed": 2}}
    kept = {"class_path": "lit_rl.datamodules.TextDataModule", "init_args": {"train": {"path": path}}}
    init = {"sources": {"toy": toys, "kept": kept}, "weights": {"toy": 3, "kept": 1}}
    config = {"data": {"class_path": "lit_rl.datamodules.MixtureDataModule", "init_args": init}}
    data = parser.instantiate(parser.parse_string(json.dumps(config))).data
    data.setup("fit")
    assert Counter(r["source"] for r in data.train_stream.at(0, 8)) == {"toy": 6, "kept": 2}
    assert next(r for r in data.train_stream.at(0, 8) if r["source"] == "kept")["completion"] == "y"


# Rewards ------------------------------------------------------------------------------------------------------------


def answer_length(completion: str, answer: str) -> float:
    return float(len(answer))


def test_a_reward_that_reads_a_column_of_one_source_must_name_it(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    data = MixtureDataModule({"toy": ToyData(), "kept": text(tmp_path, "x", 0, completion="1")})
    everywhere = FunctionReward(answer_length, per_row=True, columns=["answer"])
    with pytest.raises(ValueError, match=r"reads the column 'answer', .* restrict the reward to the sources"):
        train(tmp_path, make_module(policy, rewards=[everywhere]), data=data)


def test_each_reward_scores_the_rows_of_its_sources_alone(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    one = FunctionReward(answer_length, name="one", per_row=True, columns=["answer"], sources=["one"])
    two = FunctionReward(constant, name="two", sources=["two"])
    module = make_module(policy, rewards=[one, two], max_rollouts=1)
    train(tmp_path, module, data=MixtureDataModule({"one": ToyData(1), "two": ToyData(2)}))
    batch = module.last_rollouts
    assert batch is not None
    sources = [batch.prompts.source[g] for g in batch.group.tolist()]
    for name in ("one", "two"):
        scored = ~batch.reward_terms[name].isnan()
        assert scored.tolist() == [s == name for s in sources]
        assert (batch.reward_weights[name] != 0).tolist() == scored.tolist()
    assert sorted(set(batch.rewards.tolist())) == [1.0, 5.0]


def constant(batch: Any) -> list[float]:
    return [5.0] * len(batch.completions)
