# SPDX-License-Identifier: Apache-2.0
"""Off-policy correction: the published variants as numbers, masks, and what must not carry gradient."""

import math

import pytest
import torch
from torch import Tensor

from lit_rl.objectives import (
    DPPO,
    Clip,
    MismatchSums,
    OffPolicyCorrection,
    importance_weight,
    log_mismatch,
    mismatch_metrics,
    off_policy_sequence_mask,
    rejection_mask,
)

GAP = (0.0, 0.7, -1.2, 2.0)
SAMPLER = torch.full((1, 4), -3.0, dtype=torch.float64)
OLD = SAMPLER + torch.tensor([GAP], dtype=torch.float64)
ONES = torch.ones(1, 4)
RHO = (1, 2.013753, 0.301194, 7.389056)


def close(actual: Tensor, *expected: float) -> None:
    assert actual[0].tolist() == pytest.approx(list(expected), abs=1e-6)


VARIANTS = {
    "raw token ratio": (OffPolicyCorrection("token", weight_high=None), RHO),
    "truncated, token": (OffPolicyCorrection("token", weight_high=2.0), (1, 2, 0.301194, 2)),
    "clamped, token": (OffPolicyCorrection("token", 0.5, 5.0), (1, 2.013753, 0.5, 5)),
    "IcePop": (
        OffPolicyCorrection("token", weight_high=None, reject="token", reject_low=0.5, reject_high=5.0),
        (1, 2.013753, 0, 0),
    ),
    "masked sequence": (
        OffPolicyCorrection("sequence", weight_high=None, reject="sequence", reject_high=3.0),
        (0, 0, 0, 0),
    ),
    "masked sequence, inside": (
        OffPolicyCorrection("sequence", weight_high=None, reject="sequence", reject_high=5.0),
        (4.481689,) * 4,
    ),
    "truncated sequence": (OffPolicyCorrection("sequence", weight_high=3.0), (3, 3, 3, 3)),
    "geometric": (OffPolicyCorrection("geometric", weight_high=None), (1.454991,) * 4),
    "geometric filter, token weights": (
        OffPolicyCorrection("token", weight_high=None, reject="geometric", reject_low=0.5, reject_high=1.5),
        RHO,
    ),
    "geometric filter, dropped": (
        OffPolicyCorrection("token", weight_high=None, reject="geometric", reject_high=1.4),
        (0, 0, 0, 0),
    ),
    "veto": (OffPolicyCorrection("token", veto=0.31), (0, 0, 0, 0)),
    "veto not reached": (OffPolicyCorrection("token", veto=0.30), (1, 2, 0.301194, 2)),
    "rejection only": (OffPolicyCorrection("none", reject="token", reject_high=5.0), (1, 1, 1, 0)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    correction, expected = VARIANTS[name]
    close(correction(SAMPLER, OLD, ONES), *expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_mismatch_means_weight_one(name):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    same = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = VARIANTS[name][0](same, same, mask)
    torch.testing.assert_close(weight, mask.double())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_entries_may_hold_anything(name, garbage):
    correction = VARIANTS[name][0]
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    sampler, old = SAMPLER.repeat(2, 1), OLD.repeat(2, 1)
    clean = correction(sampler.masked_fill(~mask, 0), old.masked_fill(~mask, 0), mask)
    for s, o in ((garbage, 0.0), (0.0, garbage), (garbage, garbage)):
        dirty = correction(sampler.masked_fill(~mask, s), old.masked_fill(~mask, o), mask)
        torch.testing.assert_close(dirty, clean, atol=0, rtol=0)
    assert clean[~mask].eq(0).all()


def test_levels_against_a_naive_loop():
    generator = torch.Generator().manual_seed(1)
    sampler, old = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) > 0.4
    for i in range(4):
        gaps = [(old[i, t] - sampler[i, t]).item() for t in range(6) if mask[i, t]]
        row = {"sequence": sum(gaps), "geometric": sum(gaps) / max(len(gaps), 1)}
        for level in ("token", "sequence", "geometric"):
            expected = gaps if level == "token" else [row[level]] * len(gaps)
            ratios = [math.exp(x) for x in expected]
            assert log_mismatch(sampler, old, mask, level)[i][mask[i]].tolist() == pytest.approx(expected)
            weight = importance_weight(sampler, old, mask, level, 0.6, 1.9)[i][mask[i]]
            assert weight.tolist() == pytest.approx([min(max(r, 0.6), 1.9) for r in ratios])
            keep = rejection_mask(sampler, old, mask, level, 0.6, 1.9)[i][mask[i]]
            assert keep.tolist() == [0.6 <= r <= 1.9 for r in ratios]


def test_extreme_gaps_are_clamped():
    sampler = torch.tensor([[-1e-3, -5000.0]])
    weight = importance_weight(sampler, sampler.flip(1), torch.ones(1, 2))
    assert weight.tolist()[0] == pytest.approx([math.exp(-20), math.exp(20)])
    assert importance_weight(sampler, sampler.flip(1), torch.ones(1, 2), "sequence").isfinite().all()


def test_decoupled_objective():
    """A = 1, weight 2, ratio 1.3, clip 0.2: loss -2.4, no gradient through the clip nor through the weight."""
    old = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    sampler = (old - math.log(2.0)).detach().requires_grad_()
    current = (old + math.log(1.3)).detach().requires_grad_()
    weight = OffPolicyCorrection(weight_high=None)(sampler, old, torch.ones(1, 1))
    assert not weight.requires_grad
    loss = (weight * Clip()(current, old, torch.ones(1, 1), torch.ones(1, 1)).values).sum()
    assert loss.item() == pytest.approx(-2.4)
    (gradient,) = torch.autograd.grad(loss, current)
    assert gradient.item() == 0


@pytest.mark.parametrize(("advantage", "kept"), [(1.0, False), (-1.0, True), (0.0, False)])
def test_prime_rl_masks_by_probability_and_penalises_everywhere(advantage, kept):
    """p = 0.5 now, q = 0.2 sampled: up by 0.3. A = 0 uses the test of the low side, which a rise passes, but has
    nothing to push; the penalty (log 2.5)² = 0.839589 is there in each case."""
    rule = DPPO(max_ratio=math.inf, penalty=1e-3)
    q = torch.tensor([[math.log(0.2)]], dtype=torch.float64)
    p = torch.tensor([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    out = rule(p, q, torch.full((1, 1), advantage, dtype=torch.float64), torch.ones(1, 1))
    own = -advantage * 2.5 * math.log(0.5) if kept else 0.0
    assert out.values.item() == pytest.approx(own + 1e-3 * 0.839589, abs=1e-8)
    (gradient,) = torch.autograd.grad(out.values.sum(), p)
    # that of -keep A p/q + 1e-3 (log p/q)²
    assert gradient.item() == pytest.approx(-advantage * 2.5 * kept + 2e-3 * math.log(2.5), abs=1e-9)
    assert out.clipped.item() == (advantage == 1)


def test_off_policy_sequence_mask():
    sampler = torch.tensor([[-1.0, -1.0]] * 4)
    current = torch.tensor([[-1.0, -1.4], [-1.0, -1.4], [-3.0, -1.0], [-3.0, -1.0]])  # drifts .2 and 1.0 a token
    advantages = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 2)
    keep = off_policy_sequence_mask(sampler, current, advantages, torch.ones(4, 2), delta=0.5)
    assert keep.all(1).tolist() == [True, True, True, False]
    assert not off_policy_sequence_mask(sampler, current, advantages, torch.zeros(4, 2), delta=0.5).any()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_four_tokens():
    sums = mismatch_metrics(SAMPLER, OLD, ONES, OffPolicyCorrection(weight_high=2.0)(SAMPLER, OLD, ONES))
    summary = {k: v.item() for k, v in sums.summary().items()}
    assert summary["k3"] == pytest.approx((0 + 0.313753 + 0.501194 + 4.389056) / 4, abs=1e-6)
    assert summary["gap"] == pytest.approx(sum(GAP) / 4)
    assert summary["abs_gap"] == pytest.approx(3.9 / 4)
    assert summary["max_gap"] == pytest.approx(2.0)
    assert summary["chi2"] == pytest.approx(sum(r * r for r in RHO) / 4 - 1, abs=1e-5)
    weights = (1, 2, 0.301194, 2)
    assert summary["ess"] == pytest.approx(sum(weights) ** 2 / 4 / sum(w * w for w in weights), abs=1e-6)
    assert summary["clipped"] == 0.5  # 2.013753 and 7.389056 were truncated


def test_metrics_without_mismatch_and_without_tokens():
    mask = torch.tensor([[True, True, False]])
    same = torch.tensor([[-1.0, -2.0, math.nan]])
    perfect = {k: v.item() for k, v in mismatch_metrics(same, same, mask).summary().items()}
    assert perfect == {"k3": 0, "gap": 0, "abs_gap": 0, "max_gap": 0, "chi2": 0, "ess": 1, "clipped": 0}
    for shape in ((1, 3), (1, 0), (0, 3)):
        empty = mismatch_metrics(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)).summary()
        assert all(v.item() == 0 for v in empty.values())


def test_metrics_add_up_over_splits_and_ranks():
    generator = torch.Generator().manual_seed(2)
    sampler, old = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=generator) > 0.3
    weight = OffPolicyCorrection()(sampler, old, mask)
    whole = mismatch_metrics(sampler, old, mask, weight)
    first, second = (mismatch_metrics(sampler[s], old[s], mask[s], weight[s]) for s in (slice(0, 2), slice(2, 5)))
    other = torch.stack([getattr(second, n) for n in vars(second) if n != "max_gap"])
    reduced = first.reduce(lambda x: x + other, lambda x: torch.maximum(x, second.max_gap))
    for parts in (first.merge(second), reduced):
        assert isinstance(parts, MismatchSums)
        for name, value in whole.summary().items():
            torch.testing.assert_close(parts.summary()[name], value)


def test_single_precision_weights_do_not_count_as_clipped():
    sampler, old = SAMPLER.float(), OLD.float()
    weight = OffPolicyCorrection(weight_high=None)(sampler, old, ONES)
    assert mismatch_metrics(sampler, old, ONES, weight).clipped == 0


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"weight": "row"}, "weight must"),
        ({"reject": "row"}, "reject must"),
        ({"weight_high": 0.5}, "weight_high"),
        ({"weight_low": 1.5}, "weight_low"),
        ({"reject_high": 3.0}, "set reject"),
        ({"reject": "token"}, "drops nothing"),
        ({"veto": 2.0}, "veto"),
    ],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        OffPolicyCorrection(**arguments)
    with pytest.raises(ValueError, match="level"):
        log_mismatch(SAMPLER, OLD, ONES, "row")


def test_describe():
    assert OffPolicyCorrection().describe() == "weight rho in [0, 2], rho = old / sampler"
    trl = OffPolicyCorrection("sequence", weight_high=None, reject="sequence", reject_high=3.0, veto=1e-4)
    assert trl.describe() == (
        "weight prod rho; reject unless prod rho in [0, 3]; drop rows with any rho < 0.0001, rho = old / sampler"
    )
    assert OffPolicyCorrection("none").describe() == "no off-policy correction"
