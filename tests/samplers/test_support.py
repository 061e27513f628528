# SPDX-License-Identifier: Apache-2.0
"""The distribution that is sampled from, against sorting and counting, and tokens drawn from it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from lit_rl.samplers import Sampling
from lit_rl.samplers.support import draw_tokens, processed_logprobs

V = 12


def logits(rows: int = 5, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def naive(row: Tensor, sampling: Sampling, usable: int = V) -> list[float]:
    """Log-probabilities of one row by plain Python: temperature, then top-k, then top-p, then min-p."""
    weights = [math.exp(float(x) / sampling.temperature) if i < usable else 0.0 for i, x in enumerate(row)]
    kept = sorted((i for i in range(V) if weights[i]), key=lambda i: -weights[i])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, mass = sum(weights[i] for i in kept), 0.0
    nucleus = []
    for i in kept:
        if mass < sampling.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= sampling.min_p * weights[nucleus[0]]]
    total = sum(weights[i] for i in kept)
    return [math.log(weights[i] / total) if i in kept else -math.inf for i in range(V)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), product([1.0, 0.6, 1.7], [0, 1, 4, 50], [1.0, 0.75, 0.01], [0.0, 0.15])
)
def test_equals_sorting_and_counting(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = processed_logprobs(logits(), sampling)
    expected = torch.tensor([naive(row, sampling) for row in logits()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))


def test_the_order_is_top_k_then_top_p_then_min_p() -> None:
    """0.4, 0.3, 0.2, 0.1: top-k 3 makes them 4/9, 3/9, 2/9, so that top-p 0.7 keeps two; before it, three."""
    row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = processed_logprobs(row, Sampling(top_k=3, top_p=0.75))[0].isfinite()
    assert kept.tolist() == [True, True, False, False]
    assert processed_logprobs(row, Sampling(top_p=0.75))[0].isfinite().tolist() == [True, True, True, False]


def test_min_p_is_relative_to_the_most_likely_token() -> None:
    row = torch.tensor([[0.5, 0.26, 0.24]]).log()
    assert processed_logprobs(row, Sampling(min_p=0.5))[0].isfinite().tolist() == [True, True, False]


def test_ties_with_the_kth_token_stay() -> None:
    found = processed_logprobs(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), Sampling(top_k=2))
    assert found[0].isfinite().tolist() == [True, True, True, False]


def test_a_nucleus_smaller_than_the_most_likely_token_keeps_it() -> None:
    assert int(processed_logprobs(logits(), Sampling(top_p=1e-9)).isfinite().sum()) == 5


def test_a_nucleus_that_reaches_the_bound_exactly_is_complete() -> None:
    found = processed_logprobs(torch.zeros(1, 4), Sampling(top_p=0.5))
    assert found[0].isfinite().tolist() == [True, True, False, False]


def test_temperature_0_is_the_distribution_of_temperature_1() -> None:
    found = processed_logprobs(logits(), Sampling(temperature=0.0, top_k=2, top_p=0.5))
    torch.testing.assert_close(found, logits().log_softmax(-1))


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 3, "temperature": 0.5}])
def test_padding_rows_of_the_head_belong_to_no_restricted_support(settings: dict[str, float]) -> None:
    rows = logits()
    rows[:, 9:] += 10  # untrained rows may be large
    sampling = Sampling(**settings)
    found = processed_logprobs(rows, sampling, usable=9)
    torch.testing.assert_close(found, torch.tensor([naive(row, sampling, 9) for row in rows]), rtol=1e-5, atol=1e-5)


def test_padding_rows_keep_their_share_where_the_trainer_gives_them_one() -> None:
    for temperature in (1.0, 0.0):
        found = processed_logprobs(logits(), Sampling(temperature=temperature), usable=9)
        torch.testing.assert_close(found, logits().log_softmax(-1))


def test_half_precision_logits_are_processed_in_float32() -> None:
    assert processed_logprobs(logits().bfloat16(), Sampling(top_p=0.9)).dtype == torch.float32


def test_logits_are_not_changed() -> None:
    rows = logits()
    processed_logprobs(rows, Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1), usable=9)
    assert torch.equal(rows, logits())


# Drawing -------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_inverting_the_distribution_function() -> None:
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3])
    for u, token in ((1e-12, 0), (0.1999, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (1 - 1e-12, 3)):
        assert draw_tokens(probs[None], torch.tensor([u], dtype=torch.float64), 4).item() == token


def test_tokens_of_probability_0_are_never_drawn() -> None:
    """Neither at the ends nor exactly at a step of the distribution function."""
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(5, -1)
    u = torch.tensor([2.0**-60, 0.25, 0.5, 1 - 2.0**-53, 0.25 - 2.0**-54], dtype=torch.float64)
    assert draw_tokens(probs, u, 5).tolist() == [1, 3, 3, 3, 1]


def test_unusable_ids_are_never_drawn_and_others_keep_their_proportions() -> None:
    probs = torch.tensor([0.1, 0.3, 0.6]).expand(4000, -1)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert draw_tokens(probs, u, 2).bincount().tolist() == [1000, 3000]


def test_a_tiny_probability_among_many_is_drawn_at_its_rate() -> None:
    """The distribution function is summed in float64: float32 would lose increments below 6e-8."""
    probs = torch.full((1, 1 << 20), 1e-8)
    probs[0, 0] = 1 - 1e-8 * ((1 << 20) - 1)
    edge = float(probs[0, 0].double()) + 1e-8 * 100.5
    total = float(probs.double().sum())
    assert abs(draw_tokens(probs, torch.tensor([edge / total], dtype=torch.float64), 1 << 20).item() - 101) <= 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": 1.0}, "min_p must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_only_unrestricted_sampling_has_full_support(settings: dict[str, float]) -> None:
    assert Sampling(temperature=0.7).full_support
    assert not Sampling(**settings).full_support
