# SPDX-License-Identifier: Apache-2.0
"""Aggregation: closed-form numbers, masks, and independence from micro-batch splits."""

import pytest
import torch
from torch import Tensor

from lit_rl.objectives import GSPO, Aggregation, Clip, aggregation_weights, row_weights

MAX_LENGTH = 4
VALUES = torch.tensor([[1.0, 0, 0], [2, 2, 2]])
MASK = torch.tensor([[1.0, 0, 0], [1, 1, 1]])


def loss(values: Tensor, weights: Tensor, aggregation: Aggregation) -> float:
    element, count = aggregation_weights(weights, aggregation, MAX_LENGTH)
    return ((values * element).sum() / count.clamp(min=1)).item()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (Aggregation.SEQUENCE_MEAN, 1.5),
        (Aggregation.TOKEN_MEAN, 1.75),
        (Aggregation.CONSTANT, 0.875),
        (Aggregation.SEQUENCE_SUM, 3.5),
    ],
)
def test_a_short_and_a_long_row(aggregation, expected):
    assert loss(VALUES, MASK, aggregation) == pytest.approx(expected)
    with_empty_row = loss(torch.cat([VALUES, VALUES]), torch.cat([MASK, torch.zeros_like(MASK)]), aggregation)
    assert with_empty_row == pytest.approx(expected)  # an empty row is left out of the denominator too
    assert loss(VALUES, MASK / 2, aggregation) == pytest.approx(expected / 2)  # counts count, they do not weigh


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_against_a_naive_loop(aggregation):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 6, generator=generator, dtype=torch.float64) * (torch.rand(5, 6, generator=generator) > 0.4)
    weights[3] = 0
    rows, total_tokens, total = [], 0, 0.0
    for i in range(5):
        terms = [values[i, t].item() * weights[i, t].item() for t in range(6) if weights[i, t] != 0]
        total_tokens += len(terms)
        total += sum(terms)
        if terms:
            rows.append((sum(terms), len(terms)))
    expected = {
        Aggregation.TOKEN_MEAN: total / total_tokens,
        Aggregation.SEQUENCE_MEAN: sum(s / n for s, n in rows) / len(rows),
        Aggregation.SEQUENCE_SUM: total / len(rows),
        Aggregation.CONSTANT: total / len(rows) / MAX_LENGTH,
    }[aggregation]
    assert loss(values, weights, aggregation) == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("surrogate", [Clip(), GSPO(0.1, 0.1)], ids=["token", "row"])
def test_splits_padding_and_order_do_not_matter(aggregation, surrogate):
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    old = logprobs + 0.1 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, 1, generator=generator, dtype=torch.float64).expand(6, 5)
    weights = torch.rand(6, 5, generator=generator, dtype=torch.float64) * (torch.rand(6, 5, generator=generator) > 0.4)
    weights[2] = 0
    weigh = aggregation_weights if surrogate.level == "token" else row_weights

    def gradient(parts: list[Tensor]) -> Tensor:
        x = logprobs.clone().requires_grad_()
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for rows in parts:
            longest = int((weights[rows] != 0).any(0).nonzero().max()) + 1 if (weights[rows] != 0).any() else 0
            cut = [t[rows][:, :longest] for t in (x, old, advantages, weights)]
            element, local = weigh(cut[3], aggregation, MAX_LENGTH)
            total = total + (surrogate(*cut[:3], cut[3] != 0).values * element).sum()
            count = count + local
        return torch.autograd.grad(total / count, x)[0]

    whole = gradient([torch.arange(6)])
    assert whole.abs().sum() > 0
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 2, 0], [1, 4, 3]], [[2], [4, 5, 1, 0, 3]]):
        torch.testing.assert_close(gradient([torch.tensor(p) for p in parts]), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_nothing_to_train(aggregation):
    for shape in ((2, 3), (2, 0), (0, 3)):
        element, count = aggregation_weights(torch.zeros(shape), aggregation, MAX_LENGTH)
        assert element.shape == shape
        assert element.isfinite().all()
        assert count == 0
        assert row_weights(torch.zeros(shape), aggregation, MAX_LENGTH)[0].eq(0).all()


def test_row_weights_are_those_of_the_same_value_on_every_token():
    rows, count = row_weights(MASK)
    assert rows.tolist() == [1, 1]
    assert count == 2
    assert row_weights(0.5 * MASK)[0].tolist() == [0.5, 0.5]
    assert row_weights(MASK, Aggregation.SEQUENCE_SUM)[0].tolist() == [1, 3]  # LUSPO: |o_i| times the row's loss
    row_values = torch.tensor([0.3, -1.0])
    for aggregation in Aggregation:
        rows, count = row_weights(MASK, aggregation, MAX_LENGTH)
        as_tokens = loss(row_values[:, None].expand(2, 3), MASK, aggregation)
        assert ((row_values * rows).sum() / count).item() == pytest.approx(as_tokens)


def test_constant_needs_a_length():
    for length in (None, 0):
        with pytest.raises(ValueError, match="max_length"):
            aggregation_weights(MASK, Aggregation.CONSTANT, length)


def test_names():
    assert [a.value for a in Aggregation] == ["token_mean", "sequence_mean", "sequence_sum", "constant"]
    assert Aggregation("token_mean") is Aggregation.TOKEN_MEAN
    assert len({a.describe() for a in Aggregation}) == 4
    with pytest.raises(ValueError, match="batch_mean"):
        aggregation_weights(MASK, "batch_mean")
