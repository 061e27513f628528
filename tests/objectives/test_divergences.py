# SPDX-License-Identifier: Apache-2.0
"""Divergences: values, and gradients against exact expectations over the vocabulary."""

import math

import pytest
import torch

from lit_rl.objectives import KLPenalty, forward_kl, jsd, kl_estimate, reverse_kl

TEACHER = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
STUDENT = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
FORWARD, REVERSE = (-0.5, 0.3, 0.2), (-0.357988, 0.189557, 0.168431)


def gradient(function) -> list[float]:
    logits = STUDENT.log().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0].tolist()


def expected_gradient(penalty: KLPenalty, sampled_from: torch.Tensor) -> list[float]:
    """Exact expectation of the penalty's gradient over one token sampled from ``sampled_from``."""

    def objective(logits):
        log_pi = logits.log_softmax(0)[None]  # one row: every token of the vocabulary in turn
        values = penalty.values(log_pi, TEACHER.log()[None], sampled_from.log()[None], torch.ones(1, 3))
        return (sampled_from * values[0]).sum()

    return gradient(objective)


@pytest.mark.parametrize(("gap", "k1", "k2", "k3"), [(0.5, 0.5, 0.125, 0.106531), (-0.5, -0.5, 0.125, 0.148721)])
def test_estimators(gap, k1, k2, k3):
    own, other = torch.tensor(-1.0 + gap), torch.tensor(-1.0)
    for name, value in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert kl_estimate(own, other, name).item() == pytest.approx(value, abs=1e-6)


def test_expected_values():
    """k1 and k3 are unbiased for KL(student || teacher), k2 is not."""
    for name, value in (("k1", 0.537176), ("k2", 0.547881), ("k3", 0.537176)):
        expectation = (STUDENT * kl_estimate(STUDENT.log(), TEACHER.log(), name)).sum()
        assert expectation.item() == pytest.approx(value, abs=1e-6)


def test_k3_is_never_negative_and_everything_is_clamped():
    gaps = torch.linspace(-60, 60, 1001, dtype=torch.float64)
    k3 = kl_estimate(torch.zeros_like(gaps), gaps, "k3")
    assert (k3 >= 0).all()
    assert k3.max() == 10
    assert kl_estimate(torch.zeros_like(gaps), gaps, "k1").abs().max() == 20
    assert kl_estimate(torch.zeros_like(gaps), gaps, "k2").max() == 200
    assert kl_estimate(torch.tensor(0.0), torch.tensor(1e-5), "k3").item() == pytest.approx(5e-11, rel=0.05)


# --- which gradient --------------------------------------------------------------------------------------------------


def test_expected_gradient_of_differentiated_estimators():
    k1 = gradient(lambda z: (STUDENT * kl_estimate(z.log_softmax(0), TEACHER.log(), "k1")).sum())
    assert k1 == pytest.approx([0, 0, 0], abs=1e-12)
    for surrogate, expected in (("k2", REVERSE), ("k3+", REVERSE), ("k3", FORWARD)):
        assert expected_gradient(KLPenalty(surrogate=surrogate), STUDENT) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("surrogate", ["k1", "k2", "k3", "k3+"])
@pytest.mark.parametrize("old", [(0.2, 0.5, 0.3), (0.4, 0.35, 0.25), (0.05, 0.05, 0.9)])
def test_importance_weighting_gives_the_reverse_gradient_off_policy(surrogate, old):
    penalty = KLPenalty(surrogate=surrogate, importance_weighted=True)
    actual = expected_gradient(penalty, torch.tensor(old, dtype=torch.float64))
    assert actual == pytest.approx(REVERSE, abs=1e-6)


def test_without_importance_weighting_stale_tokens_bias_the_gradient():
    stale = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64)
    assert expected_gradient(KLPenalty(surrogate="k2"), stale) != pytest.approx(REVERSE, abs=1e-2)


def test_policy_gradient_with_the_log_ratio_as_advantage():
    advantages = TEACHER.log() - STUDENT.log()
    assert advantages.tolist() == pytest.approx([1.252763, -0.916291, -1.098612], abs=1e-6)
    assert (STUDENT * advantages).sum().item() == pytest.approx(-0.537176, abs=1e-6)
    actual = gradient(lambda z: -(STUDENT * advantages * z.log_softmax(0)).sum())
    assert actual == pytest.approx(REVERSE, abs=1e-6)


def test_value_of_k3_plus_is_k3():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 5)
    values = KLPenalty(surrogate="k3+").values(own, other, None, mask)
    torch.testing.assert_close(values, kl_estimate(own, other, "k3"))


# --- masks, reports, settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("surrogate", ["k2", "k3", "k3+"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_entries_may_hold_anything(surrogate, weighted, garbage):
    generator = torch.Generator().manual_seed(1)
    tensors = list(torch.randn(3, 2, 6, generator=generator, dtype=torch.float64))
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6]).bool()
    penalty, results = KLPenalty(surrogate=surrogate, importance_weighted=weighted), []
    for filler in (0.0, garbage):
        own, reference, old = [x.masked_fill(~mask, filler) for x in tensors]
        own.requires_grad_()
        values = penalty.values(own, reference, old, mask)
        (grad,) = torch.autograd.grad(values.sum(), own)
        results.append((values, grad, penalty.report(own, reference, mask)))
    for clean, dirty in zip(*results):
        torch.testing.assert_close(dirty, clean)
        assert dirty[~mask].eq(0).all()
        assert dirty[mask].ne(0).all()


def test_report_is_the_chosen_estimator_without_gradient():
    own = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0]])
    for name in ("k1", "k2", "k3"):
        report = KLPenalty(estimator=name).report(own, reference, torch.ones(1, 2))
        assert not report.requires_grad
        torch.testing.assert_close(report, kl_estimate(own, reference, name).detach())


def test_no_penalty_at_the_reference():
    own = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for surrogate in ("k2", "k3", "k3+"):
        values = KLPenalty(surrogate=surrogate).values(own, own.detach(), None, torch.ones(1, 2))
        (grad,) = torch.autograd.grad(values.sum(), own)
        assert values.eq(0).all()
        assert grad.eq(0).all()


@pytest.mark.parametrize("surrogate", ["k2", "k3"])
def test_gradcheck(surrogate):
    generator = torch.Generator().manual_seed(2)
    own, reference = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    penalty = KLPenalty(surrogate=surrogate)
    assert torch.autograd.gradcheck(
        lambda x: penalty.values(x, reference, None, torch.ones(2, 3)), (own.requires_grad_(),)
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"estimator": "k4"}, "estimator"), ({"surrogate": "mse"}, "surrogate"), ({"surrogate": "k1"}, "zero expected")],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        KLPenalty(**arguments)


def test_importance_weighting_needs_old_logprobs():
    with pytest.raises(ValueError, match="old_logprobs"):
        KLPenalty(importance_weighted=True).values(torch.zeros(1, 1), torch.zeros(1, 1), None, torch.ones(1, 1))
    with pytest.raises(ValueError, match="estimator"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k9")


def test_describe():
    assert KLPenalty().describe() == "KL penalty: gradient of k2 (KL(policy || reference)), reported as k3"
    assert "KL(reference || policy)" in KLPenalty(surrogate="k3").describe()


# --- full vocabulary -------------------------------------------------------------------------------------------------


def test_exact_divergences():
    p, q = STUDENT.log(), TEACHER.log()
    assert forward_kl(p, q).item() == pytest.approx(0.583815, abs=1e-6)
    assert reverse_kl(p, q).item() == pytest.approx(0.537176, abs=1e-6)
    assert jsd(p, q, 0.5).item() == pytest.approx(0.132918, abs=1e-6)
    assert jsd(p, q, 0.0) == forward_kl(p, q)
    assert jsd(p, q, 1.0) == reverse_kl(p, q)


@pytest.mark.parametrize(
    ("divergence", "expected"), [(forward_kl, FORWARD), (reverse_kl, REVERSE), (jsd, (-0.094872, 0.054721, 0.040151))]
)
def test_exact_gradients(divergence, expected):
    actual = gradient(lambda z: divergence(z, TEACHER.log()))
    assert actual == pytest.approx(expected, abs=1e-6)
    assert sum(actual) == pytest.approx(0, abs=1e-12)


def test_limits_of_the_mixture_weight():
    p, q = STUDENT.log(), TEACHER.log()
    small = 1e-6
    assert (jsd(p, q, small) / small).item() == pytest.approx(forward_kl(p, q).item(), rel=1e-4)
    assert (jsd(p, q, 1 - small) / small).item() == pytest.approx(reverse_kl(p, q).item(), rel=1e-4)


@pytest.mark.parametrize(("beta", "bound"), [(0.5, 0.693147), (0.1, 0.325083)])
def test_disjoint_support_reaches_the_bound_of_the_mixture(beta, bound):
    p = torch.tensor([0.0, -math.inf]).requires_grad_()
    q = torch.tensor([-math.inf, 0.0])
    value = jsd(p, q, beta)
    assert value.item() == pytest.approx(bound, abs=1e-6)
    assert torch.autograd.grad(value, p)[0].isfinite().all()


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd, lambda p, q: jsd(p, q, 0.3)])
def test_divergence_against_a_naive_loop_and_its_gradient(divergence):
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    value = divergence(p, q)
    assert value.shape == (2, 3)
    assert (value > 0).all()
    torch.testing.assert_close(divergence(p, p), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(divergence(p + 7, q - 3), value)
    assert torch.autograd.gradcheck(lambda x: divergence(x, q), (p.requires_grad_(),))

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b))

    a, b = p[1, 2].softmax(0).tolist(), q[1, 2].softmax(0).tolist()
    mixture = {beta: [beta * y + (1 - beta) * x for x, y in zip(a, b)] for beta in (0.5, 0.3)}
    naive = {forward_kl: kl(b, a), reverse_kl: kl(a, b)}
    beta = 0.5 if divergence is jsd else 0.3
    expected = naive.get(divergence, beta * kl(b, mixture[beta]) + (1 - beta) * kl(a, mixture[beta]))
    assert value[1, 2].item() == pytest.approx(expected)


def test_excluded_tokens_add_nothing():
    """Masked vocabulary (logit -inf in both) must leave value and gradient finite and unchanged."""
    short_p, short_q = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([1.0, 0.1, -0.4])
    inf = torch.tensor([-math.inf])
    for divergence in (forward_kl, reverse_kl, jsd):
        p = torch.cat([short_p, inf]).requires_grad_()
        value = divergence(p, torch.cat([short_q, inf]))
        torch.testing.assert_close(value, divergence(short_p, short_q))
        assert torch.autograd.grad(value, p)[0].isfinite().all()
        assert divergence(short_p.bfloat16(), short_q.bfloat16()).dtype == torch.float32


def test_mixture_weight_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="beta"):
        jsd(torch.zeros(2), torch.zeros(2), 1.5)
