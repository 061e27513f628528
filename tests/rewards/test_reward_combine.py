# SPDX-License-Identifier: Apache-2.0
"""Weighted sums: "does not apply" is left out, "could not be scored" is not."""

import math

import pytest
import torch
from inputs import reward_input
from torch import Tensor

from lit_rl.rewards import FunctionReward, Reward, check_rewards, score_rewards, verdict, weighted_sum
from lit_rl.rollouts import Prompts, Rollouts


def constant(name: str, value: float | None, **arguments: object) -> Reward:
    return FunctionReward(lambda batch: [value] * len(batch), name=name, **arguments)  # type: ignore[arg-type]


def as_list(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def test_terms_weights_and_sum_with_sources() -> None:
    batch = reward_input(["a"] * 3, source=["math", "code", "poem"])
    rewards = [
        constant("math", 1.0, weight=2.0, sources=["math"], verifier=True),
        constant("tests", None, sources=["code"]),
        constant("short", 0.25, weight=0.0),
    ]
    terms, weights = score_rewards(rewards, batch)
    assert {name: as_list(term) for name, term in terms.items()} == {
        "math": [1, None, None],
        "tests": [None, None, None],
        "short": [0.25, 0.25, 0.25],
    }
    assert {name: weight.tolist() for name, weight in weights.items()} == {
        "math": [2, 0, 0],
        "tests": [0, 1, 0],
        "short": [0, 0, 0],
    }
    assert as_list(weighted_sum(terms, weights)) == [2, None, None]  # known, failed, nobody's
    assert as_list(verdict(rewards, terms)) == [1, None, None]
    assert verdict(rewards[1:], terms).isnan().all()


def test_the_sum_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["a", "b", "c"]
    terms = {name: torch.randn(200, generator=generator) for name in names}
    weights: dict[str, Tensor | float] = {name: torch.randn(200, generator=generator) for name in names[:2]}
    for name in names:
        terms[name][torch.rand(200, generator=generator) < 0.3] = math.nan
    for name in names[:2]:
        weight = weights[name]
        assert isinstance(weight, Tensor)
        weight[torch.rand(200, generator=generator) < 0.4] = 0
    weights["c"] = 0.0
    total = weighted_sum(terms, weights)
    for i in range(200):
        parts = [(float(weights[n][i]), float(terms[n][i])) for n in names[:2]]  # type: ignore[index]
        parts = [(weight, value) for weight, value in parts if weight != 0]
        expected = sum(weight * value for weight, value in parts) if parts else math.nan
        torch.testing.assert_close(float(total[i]), expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_the_sum_is_the_one_that_rollouts_derive() -> None:
    terms = {"a": torch.tensor([1.0, math.nan, 2.0, math.nan]), "b": torch.tensor([1.0, 2.0, math.nan, math.nan])}
    weights = {"a": torch.tensor([1.0, 0.0, 0.5, 1.0]), "b": torch.tensor([2.0, 1.0, 0.0, 0.0])}
    one = torch.zeros(1, dtype=torch.long)
    prompts = Prompts(ids=[one], text=["?"], uid=one, draw=one, source=["math"])
    rollouts = Rollouts.build(prompts, torch.zeros(4, dtype=torch.long), [one] * 4)
    for name in terms:
        rollouts.reward_terms[name] = terms[name]
        rollouts.reward_weights[name] = weights[name]
    torch.testing.assert_close(weighted_sum(terms, weights), rollouts.rewards, equal_nan=True)
    assert as_list(rollouts.rewards) == [3, 2, 1, None]


def test_impossible_lists_are_refused_with_the_names() -> None:
    check_rewards([constant("a", 0.0), constant("b", 0.0, verifier=True)])
    with pytest.raises(ValueError, match="at least one"):
        check_rewards([])
    with pytest.raises(ValueError, match=r"\['a'\]"):
        check_rewards([constant("a", 0.0), constant("b", 0.0), constant("a", 0.0)])
    with pytest.raises(ValueError, match=r"\['a', 'b'\] all have verifier=True"):
        check_rewards([constant("a", 0.0, verifier=True), constant("b", 0.0, verifier=True)])
