# SPDX-License-Identifier: Apache-2.0
"""Generalised on-policy distillation: the card's numbers, its fixed point, and what reduces to what."""

import math
from pathlib import Path

import pytest
import torch
from lessons import Metrics, assert_close, checkpoint_teacher, exact_module, gradients_of, token_losses

from lit_rl.methods import GOPD, OPD
from lit_rl.methods.gopd import extrapolated_advantages
from lit_rl.objectives import AdvantageNormalizer, Clip
from lit_rl.policies import Checkpoint, FrozenCopy, Live
from lit_rl.testing import assert_same_weights, final_state, loss_and_gradients, make_module, make_policy, train

TEACHER = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STUDENT = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


def optimum(scale: float) -> torch.Tensor:
    """Where the objective is largest, found by softmax of its linear part."""
    return (scale * TEACHER.log() + (1 - scale) * REFERENCE.log()).softmax(0)


def advantages(scale: float, student: torch.Tensor = STUDENT, reference: torch.Tensor | None = REFERENCE):
    return extrapolated_advantages(student.log(), TEACHER.log(), None if reference is None else reference.log(), scale)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.0, (0.5, 0.3, 0.2)),
        (0.5, (0.553734, 0.303293, 0.142973)),
        (1.0, (0.6, 0.3, 0.1)),
        (1.25, (0.620491, 0.296422, 0.083087)),
        (1.5, (0.639379, 0.291835, 0.068786)),
    ],
)
def test_the_expected_gradient_vanishes_exactly_at_the_optimum(scale, expected):
    assert optimum(scale).tolist() == pytest.approx(expected, abs=1e-6)
    for student, zero in ((optimum(scale), True), (STUDENT, False)):
        logits = student.log().requires_grad_()
        objective = -(student * advantages(scale, student) * logits.log_softmax(0)).sum()
        (slope,) = torch.autograd.grad(objective, logits)
        assert bool((slope.abs() < 1e-9).all()) is zero


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, (0.405465, -0.287682, -0.693147)),
        (1.25, (0.451045, -0.287682, -0.866434)),
        (0.0, (0.223144, -0.287682, 0.0)),
    ],
)
def test_advantages(scale, expected):
    assert advantages(scale).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("scale", "log_z"), [(0.0, 0.0), (0.5, -0.010916), (1.0, 0.0), (1.25, 0.011998)])
def test_the_expected_advantage_is_the_log_normaliser_minus_the_divergence_from_the_optimum(scale, log_z):
    best = optimum(scale)
    divergence = float((STUDENT * (STUDENT / best).log()).sum())
    mean = float((STUDENT * advantages(scale)).sum())
    assert mean == pytest.approx(log_z - divergence, abs=1e-6)
    assert advantages(scale, best).tolist() == pytest.approx([log_z] * 3, abs=1e-6)
    if scale == 1.25:
        assert (mean, divergence) == (pytest.approx(-0.107941, abs=1e-6), pytest.approx(0.119940, abs=1e-6))


def test_at_the_reference_it_is_distillation_with_a_larger_step():
    far, near = advantages(1.25, REFERENCE), advantages(1.0, REFERENCE)
    assert far.tolist() == pytest.approx((0.227902, 0, -0.866434), abs=1e-6)
    assert far.tolist() == pytest.approx((1.25 * near).tolist())


def test_at_scale_one_the_reference_cancels_and_is_not_read():
    unknown = torch.full((3,), math.nan, dtype=torch.float64)
    assert advantages(1.0, reference=unknown).isfinite().all()
    assert torch.equal(advantages(1.0, reference=None), advantages(1.0))


def test_a_teacher_that_is_the_reference_only_pulls_back():
    for scale in (0.0, 0.7, 2.0):
        found = extrapolated_advantages(STUDENT.log(), REFERENCE.log(), REFERENCE.log(), scale)
        torch.testing.assert_close(found, REFERENCE.log() - STUDENT.log())


def test_the_dual_clip_bounds_the_loss_of_disliked_tokens():
    def loss(ratio: float) -> tuple[float, float]:
        log_p = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        old, advantage = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[-2.0]], dtype=torch.float64)
        value = Clip(0.2, 0.2, dual_clip=3.0)(log_p, old, advantage, torch.ones(1, 1)).values.sum()
        return value.item(), torch.autograd.grad(value, log_p)[0].item()

    assert loss(5.0) == (pytest.approx(6.0), 0.0)
    assert loss(1.0) == (pytest.approx(2.0), pytest.approx(2.0))


def test_a_batch_equals_a_naive_loop(tmp_path: Path):
    module = exact_module(
        tmp_path, GOPD, teacher=checkpoint_teacher(tmp_path), reference=FrozenCopy(), group_size=1, reward_scale=1.25
    )
    batch = module.last_rollouts
    with torch.no_grad():  # move away from the reference, which is the initial policy
        for parameter in module.model.parameters():
            parameter.mul_(1.05)
    batch.logprobs["old"] = module.policy_logprobs(batch, module.model)[0]
    batch.logprobs["sampler"] = batch.logprobs["old"] - 0.1  # the sampler's density was smaller: weight e^0.1
    module.providers["logprobs.teacher"](module, batch)  # in float64 this time
    batch.advantages = module.advantages(batch)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, pair in enumerate(token_losses(module, batch, lambda z, y: torch.stack([z, y]).log_softmax(-1))):
        for t, (own, theirs) in enumerate(pair):
            token = int(batch.completion_ids[i, t])
            reference = batch.logprobs["reference"][i, t]
            advantage = 1.25 * theirs[token] - 0.25 * reference - own[token].detach()
            total = total - math.exp(0.1) * advantage * (own[token] - own[token].detach()).exp()
            count += 1
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(total.detach() / count), abs=1e-9)
    assert_close(found, gradients_of(module, total / count))


def test_scale_one_is_on_policy_distillation_to_the_last_bit(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    one = make_module(policy, GOPD, teacher=Checkpoint(teacher), reward_scale=1.0, max_rollouts=2)
    other = make_module(
        policy, OPD, teacher=Checkpoint(teacher), loss="policy_gradient", surrogate=one.surrogate,
        correction=one.correction, max_rollouts=2,
    )  # fmt: skip
    metrics = Metrics()
    train(tmp_path / "one", one, [metrics])
    train(tmp_path / "other", other)
    assert_same_weights(final_state(one), final_state(other))
    assert "gopd/kl_reference" not in metrics.steps[0]
    assert metrics.steps[0]["distill/reverse_kl"] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reward_scale": 1.25}, "reference"),
        ({"reward_scale": -1.0, "reference": FrozenCopy()}, "reward_scale"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        make_module(tmp_path / "policy", GOPD, teacher=Live(), **options)


@pytest.mark.parametrize("foreign", [{"loss": "gkd"}, {"advantage": AdvantageNormalizer()}, {"discount": 0.5}])
def test_what_would_change_the_advantage_is_no_argument(tmp_path: Path, foreign: dict):
    with pytest.raises(TypeError, match="multiple values"):
        make_module(tmp_path / "policy", GOPD, teacher=Live(), reward_scale=1.0, **foreign)


def test_the_header_names_the_two_models(tmp_path: Path):
    module = make_module(tmp_path / "policy", GOPD, teacher=Live(), reference=FrozenCopy())
    assert "advantage: 1.25 log teacher -0.25 log reference - log policy" in module.describe()
