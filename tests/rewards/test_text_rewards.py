# SPDX-License-Identifier: Apache-2.0
"""Format, exact match, length, overlong, repetition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import reward_input

from lit_rl.rewards import (
    ExactMatchReward,
    FormatReward,
    LengthReward,
    OverlongReward,
    RepetitionReward,
    RewardSelfTestError,
    RewardSetupError,
)


def at_lengths(*lengths: int, **extra: Any):
    return reward_input(["x"] * len(lengths), lengths=list(lengths), **extra)


def test_format_matches_all_or_a_part() -> None:
    texts = ["<think>\na\n</think> b", "well <think>a</think> b", "b"]
    pattern = r"<think>.*</think>.*"
    assert FormatReward(pattern)(reward_input(texts)).tolist() == [1, 0, 0]
    assert FormatReward(pattern, full=False, match=0.5, mismatch=-1)(reward_input(texts)).tolist() == [0.5, 0.5, -1]


def test_format_refuses_a_broken_pattern() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        FormatReward("(")


def test_a_format_that_never_ends_is_killed_when_isolated() -> None:
    reward = FormatReward(r"(a|a)*", isolate=True, timeout=0.5)
    with pytest.warns(RuntimeWarning, match="timeout"):
        values = reward(reward_input(["a" * 60 + "b", "aa"]))
    assert values[0].isnan()
    assert values[1] == 1
    reward.close()


def test_exact_match_reads_behind_the_last_marker_of_a_finished_completion() -> None:
    texts = [">7+5=12#12", ">1#13?2# 12 ", "12", "#012", "#12", "#12"]
    batch = reward_input(texts, finished=[True] * 4 + [False, True], answer=["12", 12, "12", "12", "12", None])
    values = ExactMatchReward()(batch)
    assert values[:5].tolist() == [1, 1, 0, 0, 0]
    assert values[5].isnan()
    assert ExactMatchReward(require_finished=False)(batch)[4] == 1
    assert ExactMatchReward(strip=False)(batch)[1] == 0
    assert ExactMatchReward(marker="")(batch)[2] == 1
    assert ExactMatchReward(marker="####", answer_column="gold")(reward_input(["# 3 #### 4"], gold=["4"])) == 1


def test_exact_match_tests_itself() -> None:
    for reward in (ExactMatchReward(), ExactMatchReward(marker=""), ExactMatchReward(require_finished=False)):
        reward.self_test()

    class Lenient(ExactMatchReward):
        def score_row(self, completion: str, **columns: Any) -> float:
            return float(columns["answer"] in completion or "43" in completion)

    with pytest.raises(RewardSelfTestError, match="exact_match"):
        Lenient().self_test()


def test_overlong_numbers_of_dapo() -> None:
    batch = at_lengths(100, 16384, 18432, 20480, 22528)
    assert OverlongReward(4096, 20480)(batch).tolist() == [0, 0, -0.5, -1, -1]
    assert OverlongReward(4096, 20480, floor=False)(batch).tolist() == [0, 0, -0.5, -1, -1.5]
    assert OverlongReward(4096)(at_lengths(18432, max_length=20480)).tolist() == [-0.5]


def test_an_unknown_budget_stops_the_run() -> None:
    with pytest.raises(RewardSetupError, match="'overlong' does not know the completion budget"):
        OverlongReward(8)(at_lengths(10))
    with pytest.raises(RewardSetupError, match="larger than the completion budget"):
        OverlongReward(8)(at_lengths(10, max_length=4))
    with pytest.raises(RewardSetupError, match="'length' does not know"):
        LengthReward()(at_lengths(10))


def test_length_shapes() -> None:
    batch = at_lengths(0, 25, 50, 100, 150, max_length=100)
    assert LengthReward("linear")(batch).tolist() == [1, 0.75, 0.5, 0, 0]
    assert LengthReward("linear", start=0, end=-2)(batch).tolist() == [0, -0.5, -1, -2, -2]
    expected = [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0, 0]
    torch.testing.assert_close(LengthReward("cosine")(batch), torch.tensor(expected))
    torch.testing.assert_close(LengthReward("target", target=50)(batch), torch.tensor([-0.5, -0.25, 0.0, -0.5, -1.0]))
    wanted = LengthReward("target", target_column="budget")(at_lengths(10, 20, max_length=100, budget=[20, None]))
    torch.testing.assert_close(wanted, torch.tensor([-0.1, math.nan]), equal_nan=True)


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_repetition_is_that_of_a_loop(ids: list[int], n: int) -> None:
    seen, repeated, total = set(), 0, 0
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start : start + n])
        total += 1
        repeated += gram in seen
        seen.add(gram)
    batch = reward_input(["x"])
    batch.completion_ids = [ids]
    expected = -repeated / total if total else 0.0
    assert RepetitionReward(n)(batch).item() == pytest.approx(expected)


def test_repetition_of_words_ignores_case() -> None:
    values = RepetitionReward(2, "word")(reward_input(["a b A B", "a b c d", "", "a a a a a"]))
    assert values.tolist() == pytest.approx([-1 / 3, 0, 0, -3 / 4])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LengthReward("target"), "exactly one of target"),
        (lambda: LengthReward("linear", target=3), "exactly one of target"),
        (lambda: LengthReward("target", target=3, target_column="x"), "exactly one of target"),
        (lambda: LengthReward("square"), "shape"),  # type: ignore[arg-type]
        (lambda: LengthReward(max_length=0), "max_length"),
        (lambda: OverlongReward(0), "buffer"),
        (lambda: OverlongReward(9, 8), "buffer"),
        (lambda: RepetitionReward(0), "n must"),
        (lambda: RepetitionReward(unit="line"), "unit"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
