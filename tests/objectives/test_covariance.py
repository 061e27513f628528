# SPDX-License-Identifier: Apache-2.0
"""Clip-Cov and KL-Cov: the covariance, the selection and the loss of what was selected."""

import math

import pytest
import torch

from lit_rl.objectives import Clip, ClipCov, KLCov, predicted_entropy_change, token_covariance


def batch(rows: int = 40, length: int = 25, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(rows, length, generator=generator, dtype=torch.float64) - 0.01
    new = old + 0.1 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, length).clone()
    mask = torch.rand(rows, length, generator=generator) > 0.2
    return new, old, advantages, mask


def entropy(logits: torch.Tensor) -> float:
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum().item()


def test_covariance_of_four_tokens():
    logprobs = torch.tensor([[-0.1, -0.2, -3.0, -0.7]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1, 1, -1]], dtype=torch.float64)
    covariance = token_covariance(logprobs, advantages, torch.ones(1, 4))
    assert covariance[0].tolist() == pytest.approx([0.9, -0.8, -2.0, -0.3])
    assert covariance.mean().item() == pytest.approx(-0.55)


def test_covariance_is_invariant_to_shifts_linear_in_advantages_and_blind_to_padding():
    new, _, advantages, mask = batch()
    covariance = token_covariance(new, advantages, mask)
    torch.testing.assert_close(token_covariance(new + 3, advantages - 2, mask), covariance)
    torch.testing.assert_close(token_covariance(new, 2.5 * advantages, mask), 2.5 * covariance)
    dirty = token_covariance(new.masked_fill(~mask, math.nan), advantages.masked_fill(~mask, math.inf), mask)
    torch.testing.assert_close(dirty, covariance)
    x, a = new[mask], advantages[mask]
    assert (covariance.sum() / mask.sum()).item() == pytest.approx(((x * a).mean() - x.mean() * a.mean()).item())


@pytest.mark.parametrize(
    ("advantages", "natural", "predicted", "true"),
    [
        ((0.7, -1.3, -2.3), True, -0.007733, -0.007747),
        ((0.7, -1.3, -2.3), False, -0.002292, -0.002294),
        ((-1.0, -1.0, 9.0), True, 0.015008, 0.015145),
    ],
)
def test_predicted_entropy_change(advantages, natural, predicted, true):
    pi, a, lr = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64), 0.01
    assert predicted_entropy_change(pi.log(), a, lr, natural).item() == pytest.approx(predicted, abs=1e-6)
    moved = pi.log() + lr * (a if natural else pi * a)
    assert entropy(moved) - entropy(pi.log()) == pytest.approx(true, abs=1e-6)


def test_prediction_is_right_to_first_order():
    logits = torch.tensor([0.5, -1.0, 0.2, 1.4], dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.3, 0.4, -2.0], dtype=torch.float64)
    for lr in (1e-2, 1e-3):
        error = entropy(logits + lr * advantages) - entropy(logits) - predicted_entropy_change(logits, advantages, lr)
        assert abs(error.item()) < 10 * lr**2


# --- KL-Cov ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.5, 1.0])
def test_kl_cov_takes_the_largest_covariances(fraction):
    new, old, advantages, mask = batch()
    rule = KLCov(fraction=fraction)
    selected = rule.select(new, old, advantages, mask)
    number = max(1, math.floor(fraction * int(mask.sum())))
    covariance = token_covariance(new, advantages, mask)
    ranked = sorted((covariance[i, t].item() for i, t in mask.nonzero().tolist()), reverse=True)
    assert selected.sum() == number
    assert not (selected & ~mask).any()
    assert sorted(covariance[selected].tolist(), reverse=True) == ranked[:number]


def test_kl_cov_loss_and_gradient():
    new, old, advantages, mask = batch(rows=3, length=4)
    rule = KLCov(fraction=0.3, beta=0.7)
    selected = rule.select(new, old, advantages, mask)
    new.requires_grad_()
    out = rule(new, old, advantages, mask, selected)
    (gradient,) = torch.autograd.grad(out.values.sum(), new)
    for i, t in mask.nonzero().tolist():
        d = (new[i, t] - old[i, t]).item()
        rho, a, chosen = math.exp(d), advantages[i, t].item(), bool(selected[i, t])
        assert out.values[i, t].item() == pytest.approx(-rho * a + 0.7 * abs(d) * chosen)
        assert gradient[i, t].item() == pytest.approx(-rho * a + 0.7 * math.copysign(1, d) * chosen)


def test_kl_cov_penalty_vanishes_on_policy():
    new, _, advantages, mask = batch()
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(KLCov(beta=5.0)(new, new.detach(), advantages, mask).values.sum(), new)
    torch.testing.assert_close(gradient, -advantages * mask)


# --- Clip-Cov --------------------------------------------------------------------------------------------------------

RULE = ClipCov(fraction=0.02, cov_low=0.1, cov_high=1.0, clip_low=0.2, clip_high=0.2)


def candidates(rule: ClipCov, new, old, advantages, mask) -> torch.Tensor:
    covariance, rho = token_covariance(new, advantages, mask), (new - old).exp()
    cut = -advantages * rho.clamp(1 - rule.clip_low, 1 + rule.clip_high) > -advantages * rho
    return mask & (covariance > rule.cov_low) & (covariance < rule.cov_high) & ~cut


def test_clip_cov_draws_inside_the_band():
    inputs = batch()
    selected, allowed = RULE.select(*inputs), candidates(RULE, *inputs)
    assert selected.sum() == math.floor(0.02 * int(inputs[3].sum()))
    assert not (selected & ~allowed).any()
    everything = ClipCov(fraction=1.0, cov_low=0.1, cov_high=1.0, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(everything.select(*inputs), allowed)
    assert ClipCov(fraction=1e-9, cov_low=0.1, cov_high=1.0).select(*inputs).sum() == 1


def test_clip_cov_draw_is_uniform_and_repeatable():
    inputs = batch(rows=10, length=10)
    allowed = candidates(RULE, *inputs)
    draws = 4000
    counts = sum(RULE.select(*inputs, counter=i).double() for i in range(draws))[allowed]
    share = counts.sum() / len(counts)
    assert (counts.sum() / draws).item() == max(1, math.floor(0.02 * int(inputs[3].sum())))
    # Each candidate is a binomial draw; five deviations of the largest of a hundred are never reached by chance.
    assert (counts - share).abs().max() < 5 * share.sqrt()
    torch.testing.assert_close(RULE.select(*inputs, counter=7), RULE.select(*inputs, counter=7))
    other_seed = ClipCov(**{**vars(RULE), "seed": 1})
    assert any((RULE.select(*inputs, counter=i) != other_seed.select(*inputs, counter=i)).any() for i in range(5))


def test_clip_cov_draw_ignores_row_order_padding_and_rounding():
    inputs = batch()
    selected = RULE.select(*inputs, counter=3)
    order = torch.randperm(len(selected), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(RULE.select(*[x[order] for x in inputs], counter=3), selected[order])
    padded = [torch.cat([x, torch.zeros(len(x), 6).to(x)], 1) for x in inputs]
    torch.testing.assert_close(RULE.select(*padded, counter=3)[:, :25], selected)
    assert not RULE.select(*padded, counter=3)[:, 25:].any()


def test_clip_cov_removes_loss_and_gradient_of_the_selected_only():
    new, old, advantages, mask = batch()
    selected = RULE.select(new, old, advantages, mask)
    gradients, values = [], []
    for rule, extra in ((RULE, (selected,)), (Clip(), ())):
        x = new.clone().requires_grad_()
        out = rule(x, old, advantages, mask, *extra)
        values.append(out.values)
        gradients.append(torch.autograd.grad(out.values.sum() / mask.sum(), x)[0])
    assert selected.any()
    assert gradients[0][selected].eq(0).all()
    assert gradients[1][selected].ne(0).any()
    torch.testing.assert_close(gradients[0][~selected], gradients[1][~selected])
    torch.testing.assert_close(values[0], values[1].masked_fill(selected, 0.0))


def test_an_empty_band_is_ppo():
    new, old, advantages, mask = batch()
    rule = ClipCov(cov_low=2.0, cov_high=1.0, clip_low=0.2, clip_high=0.2)
    assert not rule.select(new, old, advantages, mask).any()
    for actual, expected in zip(rule(new, old, advantages, mask), Clip()(new, old, advantages, mask)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("size", [1, 30])
def test_equal_advantages_have_no_covariance(size):
    new, old, _, _ = batch(rows=1, length=size)
    mask = torch.ones(1, size)
    assert token_covariance(new, torch.ones_like(new), mask).abs().max() < 1e-15
    assert not ClipCov(cov_low=1e-9).select(new, old, torch.ones_like(new), mask).any()
    assert KLCov(fraction=0.1).select(new, old, torch.ones_like(new), mask).sum() == max(1, size // 10)


@pytest.mark.parametrize("rule", [KLCov(), RULE])
def test_nothing_is_selected_from_nothing(rule):
    for shape in ((2, 3), (2, 0), (0, 3)):
        zeros = torch.zeros(shape)
        assert not rule.select(zeros, zeros, zeros, zeros.bool()).any()
