# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym: endless problems by seed and index, and their own verifiers as a reward."""

from collections import Counter
from typing import Any

import pytest
import torch

from lit_rl.datamodules import ReasoningGymDataModule
from lit_rl.rewards import ReasoningGymReward, RewardInput, RewardSelfTestError
from lit_rl.rewards.gym import score_answer


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.rewards.gym.find_spec", lambda name: None)
    advice = r'needs the package reasoning-gym: pip install "lit-rl\[reasoning-gym\]"'
    with pytest.raises(ImportError, match=f"ReasoningGymDataModule {advice}"):
        ReasoningGymDataModule({"chain_sum": {}})
    with pytest.raises(ImportError, match=f"ReasoningGymReward {advice}"):
        ReasoningGymReward()


def module(**options: Any) -> ReasoningGymDataModule:
    pytest.importorskip("reasoning_gym")
    data = ReasoningGymDataModule(**{"tasks": {"chain_sum": {"min_terms": 2, "max_terms": 3}}, **options})
    data.setup("fit")
    return data


def test_problems_are_a_function_of_seed_and_index() -> None:
    walked = module().train_stream.at(0, 1200)
    assert module().train_stream.at(990, 30) == walked[990:1020]  # across two borders of chunks
    assert module(seed=1).train_stream.at(0, 20) != walked[:20]
    assert len({r["question"] for r in walked}) > 1100
    assert module().train_stream.fingerprint() == module().train_stream.fingerprint()
    assert module().train_stream.fingerprint() != module(seed=1).train_stream.fingerprint()


def test_validation_problems_do_not_depend_on_the_seed_and_differ_from_training() -> None:
    first, second = (module(seed=seed, val_size=50, samples=4, temperature=0.5) for seed in (0, 1))
    [eval_set] = first.eval_sets
    held_out = eval_set.stream.at(0, 50)
    assert held_out == second.eval_sets[0].stream.at(0, 50)
    assert (eval_set.name, len(eval_set), eval_set.samples, eval_set.temperature) == ("chain_sum", 50, 4, 0.5)
    questions = {r["question"] for r in first.train_stream.at(0, 50)}
    assert len({r["question"] for r in held_out} & questions) < 5
    assert module(val_size=0).eval_sets == []


def test_several_tasks_come_in_proportion_and_know_their_name() -> None:
    data = module(tasks={"chain_sum": {}, "countdown": {}}, weights={"chain_sum": 3, "countdown": 1}, val_size=2)
    records = data.train_stream.at(0, 40)
    assert Counter(r["source"] for r in records) == {"chain_sum": 30, "countdown": 10}
    assert all(r["task"] == r["source"] for r in records)
    assert data.train_stream.columns() == set(records[0]) - {"prompt", "uid", "source"}
    assert [s.name for s in data.eval_sets] == ["chain_sum", "countdown"]
    assert records[0]["prompt"][0]["content"].startswith(records[0]["question"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "must name at least one task"),
        ({"tasks": {"chain_sums": {}}}, "refuses the task 'chain_sums' .*not registered"),
        ({"tasks": {"chain_sum": {"terms": 3}}}, "refuses the task 'chain_sum' .*unexpected keyword argument 'terms'"),
        ({"tasks": {"chain_sum": {"min_terms": 9, "max_terms": 2}}}, "max_terms must be >= min_terms"),
        ({"tasks": {"chain_sum": {"seed": 3}}}, r"\['seed'\] of the task 'chain_sum' are set by the datamodule"),
        ({"val_size": -1}, "val_size must not be negative"),
    ],
)
def test_impossible_tasks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


# The reward ---------------------------------------------------------------------------------------------------------


def rows(data: ReasoningGymDataModule, completions: list[str]) -> RewardInput:
    records = data.train_stream.at(0, len(completions))
    n = len(completions)
    return RewardInput(
        prompts=[""] * n,
        completions=completions,
        completion_ids=[[1]] * n,
        lengths=torch.ones(n, dtype=torch.long),
        finished=torch.ones(n, dtype=torch.bool),
        group=torch.arange(n),
        columns={name: [r[name] for r in records] for name in ReasoningGymReward.requires_columns},
        source=[r["source"] for r in records],
    )


@pytest.mark.parametrize("isolate", [False, True])
def test_the_tasks_own_verifier_scores_the_tagged_answer(isolate: bool) -> None:
    data = module(tasks={"chain_sum": {}, "countdown": {}})
    answers = [r["answer"] for r in data.train_stream.at(0, 8)]
    right = [f"<answer>0</answer> no, <answer>\n{answer} </answer>" for answer in answers]
    reward = ReasoningGymReward(isolate=isolate, workers=1)
    reward.self_test()
    assert reward(rows(data, right)).tolist() == [1.0] * 8
    assert reward(rows(data, answers)).tolist() == [0.0] * 8  # without the tags there is no answer
    assert (reward(rows(data, ["<answer>nonsense</answer>"] * 8)) < 0.1).all()
    assert not reward.failures
    reward.close()


def test_credit_for_coming_close_can_be_refused() -> None:
    pytest.importorskip("reasoning_gym")
    columns: dict[str, Any] = {"question": "?", "answer": "12", "metadata": {}, "task": "chain_sum"}
    close = score_answer("<answer>it is 12</answer>", **columns)
    assert 0 < close < 1
    assert ReasoningGymReward(isolate=False).score_row("<answer>it is 12</answer>", **columns) == close
    assert ReasoningGymReward(isolate=False, exact=True).score_row("<answer>it is 12</answer>", **columns) == 0
    assert ReasoningGymReward(isolate=False, exact=True).score_row("<answer>12</answer>", **columns) == 1


def test_the_self_test_sees_a_verifier_that_is_not_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("lit_rl.rewards.gym.verifier_of", lambda task: lambda answer, entry: 1.0)
    with pytest.raises(RewardSelfTestError, match="'gym' failed its self-test"):
        ReasoningGymReward(isolate=False).self_test()
