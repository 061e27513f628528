# SPDX-License-Identifier: Apache-2.0
"""What verifiers say a completion answers, for majority votes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lit_rl.rewards import ExactMatchReward, FunctionReward, MathReward, RewardInput


def texts(*completions: str, finished: list[bool] | None = None) -> RewardInput:
    n = len(completions)
    return RewardInput(
        prompts=[""] * n,
        completions=list(completions),
        completion_ids=[[]] * n,
        lengths=torch.zeros(n, dtype=torch.long),
        finished=torch.tensor(finished or [True] * n),
        group=torch.zeros(n, dtype=torch.long),
        columns={"answer": ["42"] * n},
        source=[""] * n,
    )


def test_exact_match_answers_with_the_text_after_the_last_marker():
    reward = ExactMatchReward(require_finished=False)
    assert reward.answers(texts("1#2# 42 ", "no marker", "#")) == ["42", None, ""]


def test_an_unfinished_completion_does_not_vote_where_it_cannot_be_right():
    batch = texts("#42", "#42", finished=[True, False])
    assert ExactMatchReward(require_finished=True).answers(batch) == ["42", None]
    assert MathReward(require_finished=True).answers(batch) == [42, None]
    assert MathReward(require_finished=False).answers(batch) == [42, 42]


def test_numbers_are_equal_however_they_are_written():
    answers = MathReward().answers(texts(r"\boxed{1,200}", "The answer is 1200.0.", r"so $\frac{2400}{2}$", "none"))
    assert answers == [1200, 1200, 1200, None]


def test_latex_answers_are_numbers_or_text_without_spaces():
    pytest.importorskip("math_verify")
    reward = MathReward(backend="math_verify", isolate=False)
    answers = reward.answers(texts(r"\boxed{0.50}", r"\boxed{\frac{1}{2}}", r"\boxed{x + 1}", r"\boxed{x+1}", "x+1"))
    assert answers == [Fraction(1, 2), Fraction(1, 2), "x+1", "x+1", None]


def test_a_reward_that_knows_no_answers_says_so():
    assert FunctionReward(len, name="n").answers(texts("a")) is None
