# SPDX-License-Identifier: Apache-2.0
"""What `Reward` does around `score`: shapes, failures, sources, self-tests."""

import math
import pickle
import subprocess
import sys
import warnings
from typing import Any

import misbehaving
import pytest
import torch
from inputs import reward_input

import lit_rl.rewards
from lit_rl.rewards import PerRowReward, Reward, RewardExample, RewardInput, RewardSelfTestError, RewardSetupError


class Given(Reward):
    """Returns what it was given."""

    def __init__(self, values: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.values = values
        self.seen: list[str] = []

    def score(self, batch: RewardInput) -> Any:
        self.seen = batch.completions
        return self.values


class Misbehaving(PerRowReward):
    name = "misbehaving"
    verifier = True

    def score_row(self, completion: str, **columns: Any) -> Any:
        return misbehaving.verify(completion)


class Raises(Reward):
    def score(self, batch: RewardInput) -> Any:
        raise RuntimeError("the service is away")


def test_values_become_float32_whatever_their_type() -> None:
    batch = reward_input(["a", "b"])
    for values in ([True, 2], (1.0, 2), torch.tensor([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)):
        scored = Given(values)(batch)
        assert scored.dtype == torch.float32
        assert scored.tolist() == [1, 2]
        assert not scored.requires_grad


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], torch.ones(2, 1), torch.tensor(1.0), 1.0, None, "ab"])
def test_a_wrong_shape_is_refused_with_the_name_and_both_shapes(values: Any) -> None:
    with pytest.raises(ValueError, match=r"'given'.*expected shape \(2,\), received"):
        Given(values, name="given")(reward_input(["a", "b"]))


def test_none_and_nan_are_not_scorable_and_no_failure() -> None:
    reward = Given([None, math.nan, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(reward_input(list("abc"))).isnan().tolist() == [True, True, False]
    assert not reward.failures


@pytest.mark.parametrize("bad", [math.inf, -math.inf, 1e39, "1.0", [1.0], 10**400])
def test_what_is_no_finite_number_becomes_nan_and_counts(bad: Any) -> None:
    reward = Given([bad, 1.0], name="given")
    with pytest.warns(RuntimeWarning, match="'given' could not score 1 row.*not_a_number"):
        assert reward(reward_input(["a", "b"])).isnan().tolist() == [True, False]
    assert reward.failures == {"not_a_number": 1}


def test_an_exception_makes_every_row_nan_never_zero_and_warns_once() -> None:
    reward = Raises(name="remote")
    with pytest.warns(RuntimeWarning, match=r"'remote'.*RuntimeError: the service is away"):
        assert reward(reward_input(["a", "b"])).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(reward_input(["a"]))
    assert reward.failures == {"error": 3}
    assert reward.pop_failures() == {"error": 3}
    assert not reward.pop_failures()
    assert reward.failures == {"error": 3}


@pytest.mark.filterwarnings("ignore:Reward")
@pytest.mark.parametrize("isolate", [False, True])
def test_a_row_that_fails_does_not_touch_its_neighbours(isolate: bool) -> None:
    completions = ["42", "raise", "none", "nan", "inf", "text", "41"]
    expected = {"error": 1, "not_a_number": 2}
    if isolate:
        completions += ["segfault"]
        expected = {**expected, "crash": 1}
    reward = Misbehaving(isolate=isolate, timeout=0.5)
    values = reward(reward_input([*completions, "42"]))
    assert values[[0, 6, -1]].tolist() == [1, 0, 1]
    assert values.isnan().sum() == len(completions) - 2
    assert reward.failures == expected
    assert pickle.loads(pickle.dumps(reward)).failures == expected  # without its running processes
    reward.close()
    assert reward(reward_input(["42"])).tolist() == [1]
    reward.close()


def test_rows_of_other_sources_are_not_shown_to_the_reward() -> None:
    reward = Given([1.0, 2.0], sources=["math"])
    values = reward(reward_input(["a", "b", "c"], source=["math", "code", "math"]))
    assert reward.seen == ["a", "c"]
    assert values[[0, 2]].tolist() == [1, 2]
    assert values[1].isnan()
    assert not reward.failures
    assert Given(None, sources=["math"])(reward_input(["a"], source=["code"])).isnan().all()


def test_a_missing_column_stops_the_run() -> None:
    class NeedsAnswer(Misbehaving):
        requires_columns = ("answer",)

    with pytest.raises(RewardSetupError, match=r"'misbehaving' reads .*\['answer'\].*\['solution'\]"):
        NeedsAnswer()(reward_input(["42"], solution=["42"]))


def test_columns_reach_score_row() -> None:
    class Equal(PerRowReward):
        requires_columns = ("answer",)

        def score_row(self, completion: str, **columns: Any) -> float:
            assert list(columns) == ["answer"]
            return float(completion == columns["answer"])

    values = Equal()(reward_input(["1", "2"], answer=["1", "1"], picture=[object(), object()]))
    assert values.tolist() == [1, 0]


def test_class_attributes_are_defaults_of_the_arguments() -> None:
    assert (Misbehaving().name, Misbehaving().verifier, Misbehaving().weight) == ("misbehaving", True, 1.0)
    other = Misbehaving("other", weight=0.5, verifier=False)
    assert (other.name, other.verifier, other.weight) == ("other", False, 0.5)
    assert Raises().name == "Raises"


@pytest.mark.parametrize("arguments", [{"name": "a/b"}, {"name": "mean"}, {"weight": math.nan}])
def test_bad_names_and_weights_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="reward"):
        Raises(**arguments)


def test_a_self_test_catches_a_verifier_that_always_says_the_same() -> None:
    class Checked(Given):
        def known_examples(self) -> list[RewardExample]:
            return [RewardExample("42", 1.0, {"answer": "42"}), RewardExample("43", 0.0, {"answer": "42"})]

    Checked([1.0, 0.0], sources=["math"]).self_test()
    for always in (0.0, 1.0, math.nan):
        with pytest.raises(RewardSelfTestError, match="failed its self-test"):
            Checked([always, always]).self_test()
    Given([0.0]).self_test()  # nothing is known about it


def test_a_reward_input_keeps_its_tensors_in_a_pickle_and_selects_rows() -> None:
    batch = reward_input(["a", "bb"], finished=[True, False], answer=[1, 2], max_length=7)
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.lengths.tolist() == [1, 2]
    assert copy.finished.tolist() == [True, False]
    picked = copy.select([1])
    assert len(picked) == 1
    assert (picked.completions, picked.columns, picked.group.tolist()) == (["bb"], {"answer": [2]}, [1])
    assert (picked.lengths.tolist(), picked.max_length, picked.completion_ids) == ([2], 7, [[98, 98]])


def test_every_exported_name_exists_and_the_package_imports_without_torch() -> None:
    assert sorted(lit_rl.rewards.__all__) == sorted(lit_rl.rewards._EXPORTS)
    for name in lit_rl.rewards.__all__:
        assert getattr(lit_rl.rewards, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lit_rl.rewards.nonsense
    light = "import sys, lit_rl.rewards.pool, lit_rl.rewards.numeric, lit_rl.rewards.latex"
    heavy = "{'torch', 'pebble', 'math_verify', 'sympy', 'transformers'}"
    subprocess.run([sys.executable, "-c", f"{light}; assert not {heavy} & set(sys.modules)"], check=True)
