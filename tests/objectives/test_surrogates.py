# SPDX-License-Identifier: Apache-2.0
"""Policy losses: closed-form numbers, naive references, masks, gradients and limits."""

import math

import pytest
import torch
from torch import Tensor

from lit_rl.objectives import (
    CISPO,
    DPPO,
    GMPO,
    GSPO,
    SAPO,
    VESPO,
    Aggregation,
    Clip,
    ClipCov,
    KLCov,
    Reinforce,
    Surrogate,
    aggregation_weights,
    row_weights,
)

TINY_BAND = {"cov_low": 0.05, "cov_high": 5.0, "fraction": 0.2}
ALL: list[Surrogate] = [
    Clip(),
    Clip(clip_high=0.28, dual_clip=3.0),
    Clip(delta=2.0),
    GSPO(0.05, 0.06),
    CISPO(),
    CISPO(0.2, 0.28, absolute=False),
    GMPO(),
    Reinforce(),
    SAPO(),
    VESPO(),
    DPPO(),
    KLCov(fraction=0.2),
    ClipCov(**TINY_BAND, clip_low=0.2, clip_high=0.2),
]


def ids(value):
    return value.describe() if isinstance(value, Surrogate) else None


def tokens(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def at_ratio(surrogate: Surrogate, advantage: float, ratio: float) -> tuple[float, float, bool]:
    """Value, gradient with respect to the log-probability and clipped flag of one token."""
    logprobs = tokens(math.log(ratio) - 9).requires_grad_()
    out = surrogate(logprobs, tokens(-9.0), tokens(advantage), torch.ones(1, 1))
    (gradient,) = torch.autograd.grad(out.values.sum(), logprobs)
    return out.values.sum().item(), gradient.item(), bool(out.clipped.item())


def batch(seed: int = 0, rows: int = 6, length: int = 9, spread: float = 0.5):
    """Log-probabilities, old ones, advantages (constant along a row) and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64) - 0.05
    new = (old + spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, length).clone()
    mask = torch.rand(rows, length, generator=generator) > 0.3
    mask[2] = False
    return new, old, advantages, mask


def loss_of(surrogate: Surrogate, out, mask: Tensor, aggregation: Aggregation = Aggregation.SEQUENCE_MEAN) -> Tensor:
    weigh = aggregation_weights if surrogate.level == "token" else row_weights
    weights, count = weigh(mask.double(), aggregation)
    return (out.values * weights).sum() / count


# --- closed-form numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "gradient", "clipped"),
    [(-1, 0.5, 0.8, 0.0, True), (1, 1.5, -1.2, 0.0, True), (1, 0.5, -0.5, -0.5, False), (-1, 5, 5, 5, False)],
)
def test_clip(advantage, ratio, value, gradient, clipped):
    actual = at_ratio(Clip(), advantage, ratio)
    assert actual[:2] == pytest.approx((value, gradient))
    assert actual[2] is clipped


@pytest.mark.parametrize("surrogate", [Clip(dual_clip=3.0), Clip(delta=3.0)], ids=ids)
def test_dual_clip_bounds_the_loss_of_bad_tokens(surrogate):
    assert at_ratio(surrogate, -1, 5) == (pytest.approx(3.0), 0.0, True)
    assert at_ratio(surrogate, -1, 2) == (pytest.approx(2.0), pytest.approx(2.0), False)
    assert at_ratio(surrogate, 1, 5) == (pytest.approx(-1.2), 0.0, True)


def test_clip_higher_is_asymmetric():
    dapo = Clip(clip_low=0.2, clip_high=0.28)
    assert at_ratio(dapo, 1, 1.25)[2] is False
    assert at_ratio(dapo, 1, 1.29)[2] is True
    assert at_ratio(dapo, -1, 0.79)[2] is True


def test_sequence_ratios():
    new, old = tokens(-1 + 0.1, -1 - 0.3, -1 + 0.5), tokens(-1, -1, -1)
    mask = torch.ones(1, 3)
    for surrogate, advantage, ratio in (
        (GSPO(), 1.0, 1.105171),
        (GMPO(0.4, 0.4), 1.0, 1.068939),
        (GMPO(0.4, 0.4), -1.0, 1.105171),
    ):
        out = surrogate(new, old, tokens(*[advantage] * 3), mask)
        assert out.values.shape == (1,)
        assert out.ratio[0].tolist() == pytest.approx([ratio] * 3, abs=1e-6)
    assert GMPO()(new, old, tokens(1, 1, 1), mask).clipped.tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("surrogate", "coefficient"), [(CISPO(), 5.0), (CISPO(clip_high=0.28, absolute=False), 1.28), (Reinforce(), 1.0)]
)
def test_coefficient_of_a_large_ratio(surrogate, coefficient):
    assert at_ratio(surrogate, 1, 10)[1] == pytest.approx(-coefficient)


def test_cispo_lower_bounds():
    assert at_ratio(CISPO(clip_low=0.5), 1, 0.1)[1] == pytest.approx(-0.5)
    assert at_ratio(CISPO(0.2, 0.28, absolute=False), 1, 0.1)[1] == pytest.approx(-0.8)
    value, gradient, clipped = at_ratio(CISPO(None, 0.28, absolute=False), 1, 0.1)
    assert (value, gradient) == pytest.approx((0.1 * (9 - math.log(0.1)), -0.1))
    assert clipped is False


def test_sapo_gate():
    value, gradient, _ = at_ratio(SAPO(), 1, 1)
    assert (value, gradient) == pytest.approx((-2.0, -1.0))
    assert at_ratio(SAPO(), 1, 2)[1] / 2 == pytest.approx(-0.786448, abs=1e-6)  # gradient is rho times the slope


@pytest.mark.parametrize(
    ("advantage", "ratio", "phi"),
    [(1, 1, 1), (-1, 1, 1), (1, 0.5, 1.120422), (1, 2, 0.199148), (-1, 0.5, 0.339785), (-1, 2, 1.082682)],
)
def test_vespo_weight(advantage, ratio, phi):
    assert at_ratio(VESPO(), advantage, ratio)[1] == pytest.approx(-advantage * phi, abs=1e-6)


def test_dppo_looks_at_probabilities_not_ratios():
    rare, common = tokens(-9.0), tokens(math.log(0.5))
    up = Clip()(rare + 1, rare, tokens(1), torch.ones(1, 1))
    assert up.clipped.item()  # ratio 2.7, though the probability hardly moved
    assert not DPPO()(rare + 1, rare, tokens(1), torch.ones(1, 1)).clipped.item()
    moved = tokens(math.log(0.75))
    out = DPPO()(moved.requires_grad_(), common, tokens(1), torch.ones(1, 1))
    assert out.clipped.item()
    assert out.values.item() == 0
    assert not DPPO()(moved, common, tokens(-1), torch.ones(1, 1)).clipped.item()
    assert DPPO()(common, moved.detach(), tokens(-1), torch.ones(1, 1)).clipped.item()
    assert at_ratio(DPPO(), 1, 10)[1] == pytest.approx(-3.0)


def test_sequence_sums_fire_long_before_tokens():
    old = torch.full((1, 1000), -1.0, dtype=torch.float64)
    arguments = (old + 1e-3, old, torch.ones_like(old), torch.ones_like(old))
    assert VESPO()(*arguments).ratio[0, 0].item() == pytest.approx(math.e, abs=1e-3)
    assert not Clip()(*arguments).clipped.any()


# --- naive references ------------------------------------------------------------------------------------------------


def naive_token(surrogate: Surrogate, lp: float, old: float, a: float, row_d: list[float]) -> float:
    d = max(-20.0, min(20.0, lp - old))
    rho = math.exp(d)
    match surrogate:
        case Clip():
            first = min(rho, surrogate.delta) if surrogate.delta else rho
            loss = -min(first * a, min(max(rho, 1 - surrogate.clip_low), 1 + surrogate.clip_high) * a)
            return min(loss, surrogate.dual_clip * abs(a)) if surrogate.dual_clip and a < 0 else loss
        case CISPO(absolute=True):
            return -max(surrogate.clip_low or 0, min(rho, surrogate.clip_high)) * a * lp
        case CISPO():
            return -max(1 - (surrogate.clip_low or 1), min(rho, 1 + surrogate.clip_high)) * a * lp
        case Reinforce():
            return -a * lp
        case SAPO():
            tau = surrogate.tau_positive if a > 0 else surrogate.tau_negative
            return -a * 4 / tau / (1 + math.exp(-tau * (rho - 1)))
        case VESPO():
            k, lam = (2, 3) if a >= 0 else (3, 2)
            log_w = min(max(sum(row_d), math.log(1e-8)), 20)
            return -math.exp(lam + k * log_w - lam * math.exp(log_w)) * a * lp
        case DPPO():
            change = math.exp(lp) - math.exp(old)
            keep = change <= surrogate.clip_high if a > 0 else change >= -surrogate.clip_low
            return -a * min(rho, surrogate.max_ratio) * lp * keep
    raise AssertionError(surrogate)


def naive_row(surrogate: Surrogate, d: list[float], a: float) -> float:
    sign = (a > 0) - (a < 0)
    if isinstance(surrogate, GSPO):
        s = math.exp(sum(d) / len(d))
        return -min(s * a, min(max(s, 1 - surrogate.clip_low), 1 + surrogate.clip_high) * a)
    u = [sign * min(sign * x, sign * min(max(x, -surrogate.clip_low), surrogate.clip_high)) for x in d]
    return -a * math.exp(sum(u) / len(u))


@pytest.mark.parametrize("surrogate", [s for s in ALL if not s.selects_over_batch], ids=ids)
def test_against_a_naive_loop(surrogate):
    new, old, advantages, mask = batch(seed=5)
    out = surrogate(new, old, advantages, mask)
    for i in range(len(new)):
        kept = [t for t in range(new.shape[1]) if mask[i, t]]
        d = [(new[i, t] - old[i, t]).item() for t in kept]
        if surrogate.level == "sequence":
            expected = naive_row(surrogate, d, advantages[i, 0].item()) if kept else 0.0
            assert out.values[i].item() == pytest.approx(expected)
            continue
        for t in range(new.shape[1]):
            row = (new[i, t].item(), old[i, t].item(), advantages[i, t].item(), d)
            assert out.values[i, t].item() == pytest.approx(naive_token(surrogate, *row) if mask[i, t] else 0.0)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_entries_may_hold_anything(surrogate, garbage):
    new, old, advantages, mask = batch(seed=1)
    results = []
    for filler in (0.0, garbage):
        inputs = [x.masked_fill(~mask, filler) for x in (new, old, advantages)]
        inputs[0].requires_grad_()
        out = surrogate(*inputs, mask)
        (gradient,) = torch.autograd.grad(loss_of(surrogate, out, mask), inputs[0])
        results.append((*out, gradient))
    for clean, dirty in zip(*results):
        torch.testing.assert_close(dirty, clean, atol=0, rtol=0)
    values, ratio, clipped, gradient = results[1]
    outside = ~mask if surrogate.level == "token" else ~mask.any(1)
    assert values[outside].eq(0).all()
    assert ratio[~mask].eq(0).all()
    assert not clipped[~mask].any()
    assert gradient[~mask].eq(0).all()
    assert not ratio.requires_grad
    assert not clipped.requires_grad


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_nothing_to_train(surrogate):
    for shape in ((2, 3), (2, 0), (0, 3)):
        new = torch.full(shape, -1.0, requires_grad=True)
        out = surrogate(new, torch.full(shape, -2.0), torch.ones(shape), torch.zeros(shape))
        assert out.values.shape == (shape if surrogate.level == "token" else shape[:1])
        assert out.values.sum().item() == 0
        assert out.values.requires_grad


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_extreme_log_ratios_stay_finite(surrogate):
    new = torch.tensor([[-1e-3, -2000.0, -1e-3, -2000.0]], requires_grad=True)
    old = torch.tensor([[-2000.0, -1e-3, -2000.0, -1e-3]])
    out = surrogate(new, old, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4))
    (gradient,) = torch.autograd.grad(out.values.sum(), new)
    assert out.values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_half_precision_is_widened_before_ratios_are_taken(surrogate):
    new, old, advantages, mask = batch(seed=2)
    out = surrogate(new.bfloat16(), old.bfloat16(), advantages.bfloat16(), mask)
    exact = surrogate(*[x.bfloat16().float() for x in (new, old, advantages)], mask)
    assert out.values.dtype == torch.float32
    torch.testing.assert_close(out.values, exact.values)


# --- gradients and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", [Clip(0.2, 0.28, 3.0), GSPO(0.05, 0.06), GMPO(), SAPO(), KLCov(0.2)], ids=ids)
def test_gradcheck(surrogate):
    new, old, advantages, mask = batch(seed=4, rows=3, length=4)
    selected = surrogate.select(new, old, advantages, mask)
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: surrogate(x, old, advantages, mask, selected).values, (new,))


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_clipped_tokens_of_hard_clips_have_no_gradient(surrogate):
    new, old, advantages, mask = batch(seed=6, spread=1.0)
    new.requires_grad_()
    out = surrogate(new, old, advantages, mask)
    (gradient,) = torch.autograd.grad(out.values.sum(), new)
    if isinstance(surrogate, Clip | GSPO | GMPO | DPPO | ClipCov):
        assert out.clipped.any()
        torch.testing.assert_close(gradient == 0, out.clipped | ~mask)
    elif isinstance(surrogate, Reinforce | SAPO | VESPO):
        assert not out.clipped.any()


@pytest.mark.parametrize(
    "surrogate", [Clip(), Clip(dual_clip=3.0), CISPO(), SAPO(), VESPO(), DPPO(), KLCov(), GSPO(), GMPO()], ids=ids
)
def test_on_policy_all_surrogates_have_the_gradient_of_reinforce(surrogate):
    new, _, advantages, mask = batch(seed=7)
    gradients = []
    for rule in (surrogate, Reinforce()):
        x = new.clone().requires_grad_()
        out = rule(x, x.detach(), advantages, mask)
        (gradient,) = torch.autograd.grad(loss_of(rule, out, mask), x)
        gradients.append(gradient)
        assert out.ratio[mask].eq(1).all()
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_no_advantage_means_no_gradient(surrogate):
    new, old, _, mask = batch(seed=8)
    new.requires_grad_()
    out = surrogate(new, old, torch.zeros_like(old), mask)
    (gradient,) = torch.autograd.grad(out.values.sum(), new)
    if isinstance(surrogate, KLCov):
        gradient = gradient[~surrogate.select(new, old, torch.zeros_like(old), mask)]
    assert gradient.eq(0).all()
    assert not out.clipped.any()


def test_wide_bounds_turn_clips_off():
    new, old, advantages, mask = batch(seed=9, spread=0.3)
    plain = -(new - old).exp() * advantages * mask
    torch.testing.assert_close(Clip(1.0, 1e6)(new, old, advantages, mask).values, plain)
    torch.testing.assert_close(KLCov(beta=0.0)(new, old, advantages, mask).values, plain)
    wide = GMPO(50.0, 50.0)(new, old, advantages, mask).values
    torch.testing.assert_close(wide, GSPO(1.0, 1e6)(new, old, advantages, mask).values)
    torch.testing.assert_close(
        CISPO(clip_high=1e6)(new, old, advantages, mask).values, plain * new, msg="unbounded coefficient"
    )


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_rows_and_micro_batches_do_not_matter(surrogate):
    new, old, advantages, mask = batch(seed=10)
    selected = surrogate.select(new, old, advantages, mask)
    whole = surrogate(new, old, advantages, mask, selected)
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))
    shuffled = surrogate(*[x[order] for x in (new, old, advantages, mask, selected)])
    parts = [surrogate(*[x[s] for x in (new, old, advantages, mask, selected)]) for s in (slice(0, 1), slice(1, 6))]
    for name in ("values", "ratio", "clipped"):
        torch.testing.assert_close(getattr(shuffled, name), getattr(whole, name)[order])
        torch.testing.assert_close(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


def test_bounds_may_be_scheduled():
    surrogate = Clip()
    assert at_ratio(surrogate, 1, 1.25)[2] is True
    surrogate.clip_high = 0.28
    assert at_ratio(surrogate, 1, 1.25)[2] is False


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Clip(clip_low=-0.1), "clip_low"),
        (lambda: Clip(clip_high=math.nan), "clip_high"),
        (lambda: Clip(dual_clip=1.0), "dual_clip"),
        (lambda: Clip(delta=1.1), "delta"),
        (lambda: Clip(dual_clip=3.0, delta=3.0), "only one"),
        (lambda: GSPO(clip_high=-1), "clip_high"),
        (lambda: CISPO(clip_high=0.28), "absolute=False"),
        (lambda: GMPO(clip_low=-1), "clip_low"),
        (lambda: SAPO(tau_positive=0), "tau_positive"),
        (lambda: VESPO(k_negative=-1), "k_negative"),
        (lambda: DPPO(max_ratio=0.5), "max_ratio"),
        (lambda: KLCov(fraction=0.0), "fraction"),
        (lambda: KLCov(beta=-1), "beta"),
        (lambda: ClipCov(fraction=2), "fraction"),
    ],
)
def test_impossible_settings_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("surrogate", ALL, ids=ids)
def test_describe_is_one_line(surrogate):
    assert surrogate.describe()
    assert "\n" not in surrogate.describe()
