# SPDX-License-Identifier: Apache-2.0
"""Reinforcement-aware distillation: the anchor's numbers, where it blocks, and that GRPO is one end of it."""

import math
from pathlib import Path

import pytest
import torch
from lessons import Metrics, assert_close, checkpoint_teacher, exact_module, gradients_of, token_losses

from lit_rl.methods import GRPO, RLAD
from lit_rl.methods.rlad import trust_region_anchor
from lit_rl.objectives import Aggregation, Clip
from lit_rl.policies import Checkpoint, Live
from lit_rl.testing import assert_same_weights, final_state, loss_and_gradients, make_module, make_policy, train


def log(x: float) -> torch.Tensor:
    return torch.tensor([[x]], dtype=torch.float64).log()


def anchor(old: float, teacher: float, weight: float) -> float:
    return float(trust_region_anchor(log(old), log(teacher), weight).exp())


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 0.848528), (1.0, 1.2), (0.0, 0.6)])
def test_ratio(weight, expected):
    assert 0.3 / anchor(0.25, 0.5, weight) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.2), (0.5, 0.4), (0.0, 0.8)])
def test_anchor_and_start_ratio(weight, expected):
    found = anchor(0.2, 0.8, weight)
    assert found == pytest.approx(expected)
    assert 0.2 / found == pytest.approx(0.2 / expected)
    assert 1.2 * found == pytest.approx({1.0: 0.24, 0.5: 0.48, 0.0: 0.96}[weight])


def test_anchor_of_a_token_that_the_teacher_dislikes():
    found = anchor(0.5, 0.1, 0.5)
    assert (found, 0.5 / found, 1.2 * found) == pytest.approx((0.223607, 2.236068, 0.268328), abs=1e-6)


def surrogate(old: float, teacher: float, advantage: float, weight: float = 0.5) -> tuple[float, float]:
    """Objective and coefficient of grad log π at π = π_old."""
    own = log(old).requires_grad_()
    reference = trust_region_anchor(log(old), log(teacher), weight)
    loss = Clip()(own, reference, torch.full((1, 1), advantage).double(), torch.ones(1, 1)).values.sum()
    return -loss.item(), -torch.autograd.grad(loss, own)[0].item()


@pytest.mark.parametrize(
    ("old", "teacher", "advantage", "expected"),
    [
        (0.2, 0.8, 1.0, (0.5, 0.5)),
        (0.2, 0.8, -1.0, (-0.8, 0.0)),
        (0.5, 0.1, 1.0, (1.2, 0.0)),
        (0.5, 0.1, -1.0, (-2.236068, -2.236068)),
    ],
)
def test_first_step_protects_what_the_teacher_likes_and_does_not_reinforce_what_it_dislikes(
    old, teacher, advantage, expected
):
    assert surrogate(old, teacher, advantage) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("weight", "disliked", "liked"), [(0.5, 0.364643, 0.446287), (0.8, 0.911608, 1.115718), (0.9, 1.823216, 2.231436)]
)
def test_first_step_cut_offs(weight, disliked, liked):
    for offset, blocked in ((-1e-4, False), (1e-4, True)):
        up = surrogate(0.01, 0.01 * math.exp(-disliked - offset), 1.0, weight)[1]
        down = surrogate(0.001, 0.001 * math.exp(liked + offset), -1.0, weight)[1]
        assert ((up == 0), (down == 0)) == (blocked, blocked)


def test_the_anchor_has_no_gradient_and_ignores_the_teacher_at_weight_one():
    old, teacher = log(0.2).requires_grad_(), log(0.8).requires_grad_()
    assert not trust_region_anchor(old, teacher, 0.5).requires_grad
    infinite = torch.full((1, 1), -math.inf).double()
    assert torch.equal(trust_region_anchor(old, infinite, 1.0), old.detach())
    assert torch.equal(trust_region_anchor(old, torch.full((1, 1), math.nan).double(), 0.3), old.detach())


def test_a_batch_equals_a_naive_loop(tmp_path: Path):
    module = exact_module(tmp_path, RLAD, teacher=checkpoint_teacher(tmp_path), old_policy_weight=0.3)
    batch = module.last_rollouts.clone()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.3)
    old = batch.logprobs["sampler"].double()
    batch.logprobs["old"] = old
    batch.advantages = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0)).double().expand_as(old)
    rows, blocked, tokens = [], 0, 0
    pairs = token_losses(module, batch, lambda z, y: torch.stack([z, y]).log_softmax(-1))
    for i, pair in enumerate(pairs):
        values = []
        for t, (own, theirs) in enumerate(pair):
            token, advantage = int(batch.completion_ids[i, t]), float(batch.advantages[i, t])
            ratio = (own[token] - 0.3 * old[i, t] - 0.7 * theirs[token]).exp()
            values.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            blocked += (advantage > 0 and ratio.item() > 1.2) or (advantage < 0 and ratio.item() < 0.8)
            tokens += 1
        rows.append(torch.stack(values).mean())
    assert 0 < blocked < tokens
    expected = torch.stack(rows).mean()
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-6)
    assert_close(found, gradients_of(module, expected), 1e-6)
    batch.advantages = torch.zeros_like(old)  # the teacher speaks only where the reward does
    assert not any(float(g.abs().max()) for g in loss_and_gradients(module, batch, 10**9)[1].values())


def test_at_weight_one_and_with_itself_as_teacher_it_is_grpo(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    plain = make_module(policy, GRPO, aggregation=Aggregation.SEQUENCE_MEAN, max_rollouts=2)
    mine = make_module(policy, RLAD, teacher=Checkpoint(teacher), old_policy_weight=1.0, max_rollouts=2)
    own = make_module(policy, RLAD, teacher=Live(), old_policy_weight=0.0, max_rollouts=2, old_logprobs="recompute")
    metrics = Metrics()
    train(tmp_path / "plain", plain)
    train(tmp_path / "mine", mine)
    train(tmp_path / "own", own, [metrics])
    assert_same_weights(final_state(plain), final_state(mine))
    for name, weight in final_state(plain).items():
        torch.testing.assert_close(final_state(own)[name], weight, rtol=0, atol=1e-4)
    assert metrics.steps[0]["rlad/teacher_gap"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_changes_what_is_learned_and_the_log_says_how(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    metrics = Metrics()
    train(tmp_path / "run", make_module(policy, RLAD, teacher=Checkpoint(teacher), max_rollouts=2), [metrics])
    assert {"rlad/log_ratio", "rlad/teacher_gap", "rlad/blocked_up", "rlad/blocked_down"} <= metrics.steps[-1].keys()
    assert abs(metrics.steps[0]["rlad/teacher_gap"]) > 1e-3


def test_impossible_weights_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="old policy's share"):
        make_module(tmp_path / "policy", RLAD, teacher=Live(), old_policy_weight=1.5)
    assert "ratio: policy / (old^0.5 teacher^0.5)" in make_module(tmp_path / "p", RLAD, teacher=Live()).describe()
