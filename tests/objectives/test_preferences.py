# SPDX-License-Identifier: Apache-2.0
"""Preference losses: closed forms, a naive loop, limits."""

import math

import pytest
import torch

from lit_rl.objectives import (
    PreferenceLoss,
    dpo_hinge,
    dpo_ipo,
    dpo_robust,
    dpo_sigmoid,
    sequence_log_ratios,
)

LOSSES = [
    PreferenceLoss("sigmoid", 0.3),
    PreferenceLoss("sigmoid", 0.3, label_smoothing=0.2),
    PreferenceLoss("robust", 0.3, label_smoothing=0.2),
    PreferenceLoss("ipo", 0.3),
    PreferenceLoss("hinge", 0.3),
]


def pair(delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([delta + 1.7], dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)


def naive(loss: PreferenceLoss, delta: float) -> float:
    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    m, s = loss.beta * delta, loss.label_smoothing
    return {
        "sigmoid": -(1 - s) * log_sigmoid(m) - s * log_sigmoid(-m),
        "robust": (-(1 - s) * log_sigmoid(m) + s * log_sigmoid(-m)) / (1 - 2 * s),
        "ipo": (delta - 1 / (2 * loss.beta)) ** 2,
        "hinge": max(0.0, 1 - m),
    }[loss.kind]


def test_closed_forms():
    assert dpo_sigmoid(*pair(0.0)).item() == pytest.approx(math.log(2))
    assert dpo_sigmoid(*pair(math.log(3)), beta=1.0).item() == pytest.approx(math.log(4 / 3))  # sigmoid = 3/4
    assert dpo_sigmoid(*pair(0.0), label_smoothing=0.3).item() == pytest.approx(math.log(2))
    assert dpo_robust(*pair(0.0), label_smoothing=0.3).item() == pytest.approx(math.log(2))
    assert dpo_ipo(*pair(5.0), beta=0.1).item() == pytest.approx(0)
    assert dpo_ipo(*pair(0.0), beta=0.5).item() == pytest.approx(1)
    assert dpo_hinge(*pair(4.0), beta=0.1).item() == pytest.approx(0.6)
    assert dpo_hinge(*pair(11.0), beta=0.1).item() == 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.describe())
def test_against_a_naive_loop(loss):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 4 * torch.randn(2, 9, generator=generator, dtype=torch.float64)
    expected = [naive(loss, (c - r).item()) for c, r in zip(chosen, rejected)]
    assert loss(chosen, rejected).tolist() == pytest.approx(expected)
    chosen.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, rejected), (chosen,))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.describe())
def test_a_common_shift_changes_nothing_and_the_chosen_completion_is_pushed_up(loss):
    chosen, rejected = (x.requires_grad_() for x in pair(-0.5))
    value = loss(chosen, rejected)
    torch.testing.assert_close(loss(chosen + 3, rejected + 3), value)
    up, down = torch.autograd.grad(value.sum(), (chosen, rejected))
    assert up.item() < 0
    assert down.item() == pytest.approx(-up.item())


def test_gradient_of_dpo_at_zero_is_half_beta():
    chosen, rejected = pair(0.0)
    (gradient,) = torch.autograd.grad(dpo_sigmoid(chosen.requires_grad_(), rejected, beta=0.4).sum(), chosen)
    assert gradient.item() == pytest.approx(-0.2)


def test_without_smoothing_robust_is_plain():
    torch.testing.assert_close(dpo_robust(*pair(0.8), label_smoothing=0.0), dpo_sigmoid(*pair(0.8)))


def test_robust_loss_is_unbiased_under_flipped_labels():
    s, (chosen, rejected) = 0.2, pair(0.9)
    noisy = (1 - s) * dpo_robust(chosen, rejected, 0.5, s) + s * dpo_robust(rejected, chosen, 0.5, s)
    torch.testing.assert_close(noisy, dpo_sigmoid(chosen, rejected, 0.5))


def test_large_margins_stay_finite():
    for delta in (-1e6, 1e6):
        for loss in LOSSES:
            assert loss(*pair(delta)).isfinite().all()


@pytest.mark.parametrize("garbage", [0.0, math.nan, -math.inf])
def test_sequence_log_ratios(garbage):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    policy = torch.tensor([[-1.0, -2.0, 0], [-0.5, 0, 0], [0, 0, 0]]).masked_fill(~mask, garbage).requires_grad_()
    reference = torch.tensor([[-1.5, -3.0, 0], [-0.25, 0, 0], [0, 0, 0]]).masked_fill(~mask, garbage)
    total = sequence_log_ratios(policy, reference, mask)
    assert total.tolist() == pytest.approx([1.5, -0.25, 0])
    assert sequence_log_ratios(policy, reference, mask, True).tolist() == pytest.approx([0.75, -0.25, 0])
    assert torch.equal(
        PreferenceLoss(length_normalized=True).log_ratios(policy, reference, mask) * 2,
        total.new_tensor([1.5, -0.5, 0.0]),
    )
    (gradient,) = torch.autograd.grad(total.sum(), policy)
    torch.testing.assert_close(gradient, mask.float())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "kto"}, "kind"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no effect"),
    ],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        PreferenceLoss(**arguments)
