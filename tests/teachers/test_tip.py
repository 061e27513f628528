# SPDX-License-Identifier: Apache-2.0
"""TIP: scores of the card's six tokens, shares of each row, sampling in proportion, runs with half of the tokens."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import Metrics, assert_close, checkpoint_teacher, exact_module, gradients_of, token_losses

from lit_rl.callbacks import TokenImportance
from lit_rl.callbacks.tip import largest_share, min_max, rank_correlation, soft_or
from lit_rl.methods import GRPO, KDRL, OPD
from lit_rl.objectives import Divergence, forward_kl, jsd, reverse_kl
from lit_rl.policies import Checkpoint
from lit_rl.testing import (
    assert_same_weights,
    final_state,
    loss_and_gradients,
    make_module,
    make_policy,
    train,
)

ENTROPIES = torch.tensor([0.1, 0.4, 0.8, 1.2, 0.05, 0.3], dtype=torch.float64)
KLS = torch.tensor([0.02, 0.5, 0.1, 0.6, 2.0, 0.3], dtype=torch.float64)
ALL = torch.ones(1, 6, dtype=torch.bool)


@pytest.mark.parametrize(("h", "d", "expected"), [(0, 1, 1), (0.2, 0.1, 0.28), (0.5, 0, 0.5), (1, 0.3, 1)])
def test_soft_or(h, d, expected):
    assert float(soft_or(torch.tensor(float(h)), torch.tensor(float(d)))) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_soft_or_is_symmetric_monotone_and_at_least_each_axis(h, d, more):
    a, b = torch.tensor(h, dtype=torch.float64), torch.tensor(d, dtype=torch.float64)
    value = float(soft_or(a, b))
    assert value == pytest.approx(float(soft_or(b, a)))
    assert max(h, d) - 1e-12 <= value <= 1 + 1e-12
    assert float(soft_or(torch.maximum(a, torch.tensor(more).double()), b)) >= value - 1e-12


def test_entropies_and_divergences_of_the_card():
    student, teacher = torch.tensor([0.7, 0.2, 0.1]).double().log(), torch.tensor([0.2, 0.5, 0.3]).double().log()
    entropy = float(torch.distributions.Categorical(logits=student).entropy())
    assert (entropy, entropy / math.log(3)) == pytest.approx((0.801819, 0.729847), abs=1e-6)
    assert float(reverse_kl(student, teacher)) == pytest.approx(0.583815, abs=1e-6)
    confident, right = torch.tensor([0.97, 0.02, 0.01]).double().log(), torch.tensor([0.1, 0.8, 0.1]).double().log()
    assert float(torch.distributions.Categorical(logits=confident).entropy()) / math.log(3) == pytest.approx(
        0.140029, abs=1e-6
    )
    assert float(reverse_kl(confident, right)) == pytest.approx(2.107159, abs=1e-6)
    assert float(forward_kl(confident, right)) == pytest.approx(2.954149, abs=1e-6)
    power = TokenImportance(strategy="power_sample", entropy_power=1, divergence_power=1).power(
        torch.tensor(0.729847).double(), jsd(student, teacher)
    )
    assert float(power) == pytest.approx(0.139956, abs=1e-5)


def test_scaled_axes_and_scores_of_six_tokens():
    h, d = min_max(ENTROPIES, ENTROPIES, 0.98), min_max(KLS, KLS)
    assert h.tolist() == pytest.approx([0.045045, 0.315315, 0.675676, 1, 0, 0.225225], abs=1e-6)
    assert d.tolist() == pytest.approx([0, 0.242424, 0.040404, 0.292929, 1, 0.141414], abs=1e-6)
    scores = soft_or(h, d)
    assert scores.tolist() == pytest.approx([0.045045, 0.481299, 0.688780, 1, 1, 0.334789], abs=1e-6)
    assert largest_share(scores[None], ALL, 0.5)[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert largest_share(ENTROPIES[None], ALL, 0.5)[0].nonzero()[:, 0].tolist() == [1, 2, 3]
    assert largest_share(scores[None], ALL, 0.2)[0].nonzero()[:, 0].tolist() == [3]


def test_a_constant_axis_is_zero_and_not_nan():
    assert min_max(torch.full((3,), 0.7), torch.full((3,), 0.7), 0.98).tolist() == [0, 0, 0]
    assert min_max(torch.zeros(2), torch.zeros(0)).tolist() == [0, 0]


def test_every_row_keeps_at_least_one_token_and_only_candidates():
    candidates = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    kept = largest_share(torch.tensor([[0.1, 9, 9], [9, 9, 9], [1, 2, 3.0]]), candidates, 0.1)
    assert kept.int().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_rank_correlation():
    x = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert float(rank_correlation(x, x.exp())) == pytest.approx(1.0)
    assert float(rank_correlation(x, -x)) == pytest.approx(-1.0)


# --- on a batch ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tip")
    return exact_module(folder, OPD, teacher=checkpoint_teacher(folder), divergence=Divergence(1.0))


def compared(module):
    batch = module.last_rollouts.clone()
    module.providers["divergence.reverse"](module, batch)
    return batch


def test_signals_are_those_of_both_models(module):
    batch = compared(module)
    for name, function in (("reverse", reverse_kl), ("forward", forward_kl), ("jsd", jsd)):
        rows = token_losses(module, batch, function)
        for i, values in enumerate(rows):
            torch.testing.assert_close(batch.token[f"divergence.{name}"][i, : len(values)], values.detach())
    assert batch.token["divergence.reverse"][~batch.kept_mask()].isnan().all()


@pytest.mark.parametrize("strategy", ["soft_or", "entropy_topk", "q3"])
def test_the_loss_is_the_mean_over_the_tokens_that_a_naive_loop_selects(module, strategy):
    batch = compared(module)
    entropy = [v.detach() for v in token_losses(module, batch, lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum())]
    kl = [v.detach() for v in token_losses(module, batch, reverse_kl)]
    forward = [v.detach() for v in token_losses(module, batch, forward_kl)]
    flat_h, flat_d = torch.cat(entropy), torch.cat(kl)
    top = torch.quantile(flat_h, 0.98)
    low, high = flat_h.clamp(max=top).min(), flat_h.clamp(max=top).max()
    total, count = torch.zeros((), dtype=torch.float64), 0
    losses = token_losses(module, batch, reverse_kl)
    for h, d, f, values in zip(entropy, kl, forward, losses):
        scaled = (h.clamp(max=top) - low) / (high - low)
        score = {
            "soft_or": 1 - (1 - scaled) * (1 - (d - flat_d.min()) / (flat_d.max() - flat_d.min())),
            "entropy_topk": h,
            "q3": f * (1 - scaled),
        }[strategy]
        keep = sorted(range(len(h)), key=lambda t, s=score: -float(s[t]))[: max(1, len(h) // 2)]
        total, count = total + values[keep].sum(), count + len(keep)
    TokenImportance(0.5, strategy).on_loss_weights(None, module, batch)
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(total.detach() / count), abs=1e-9)
    assert_close(found, gradients_of(module, total / count))


@pytest.mark.parametrize("strategy", ["entropy_sample", "power_sample"])
def test_sampling_prefers_large_weights_repeats_and_keeps_the_share(module, strategy):
    callback = TokenImportance(0.4, strategy, divergence_power=1.0)
    batch = compared(module)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(batch.loss_weights.shape, generator=generator)
    batch.token["divergence.student_entropy"] = weights.double()
    batch.token["divergence.jsd"] = torch.full_like(weights, 0.3)
    counts = torch.zeros_like(weights)
    kept = batch.kept_mask()
    for seed in range(400):
        trial = batch.clone()
        module.seed = seed
        callback.on_loss_weights(None, module, trial)
        again = batch.clone()
        callback.on_loss_weights(None, module, again)
        assert torch.equal(trial.loss_weights, again.loss_weights)
        chosen = trial.loss_weights != 0
        if strategy == "entropy_sample":
            assert chosen.sum(1).tolist() == [max(1, math.floor(0.4 * n)) for n in kept.sum(1).tolist()]
        else:
            assert int(chosen.sum()) == math.floor(0.4 * int(kept.sum()))
        counts += chosen
    assert counts[~kept].eq(0).all()
    heavy, light = kept & (weights > 0.8), kept & (weights < 0.2)
    assert counts[heavy].mean() > 2 * counts[light].mean()


def test_tokens_without_a_teacher_are_not_touched(module):
    batch = compared(module)
    for name in ("reverse", "forward", "jsd", "student_entropy", "teacher_entropy"):
        batch.token[f"divergence.{name}"][0] = math.nan
    TokenImportance(0.2).on_loss_weights(None, module, batch)
    assert (batch.loss_weights[0] != 0).sum() == batch.lengths[0]
    assert (batch.loss_weights[2] != 0).sum() == 1


def test_quadrants_partition_the_tokens(module):
    module.ledger = type(module.ledger)()
    TokenImportance(0.5).on_loss_weights(None, module, compared(module))
    logged = module.ledger.reduce(torch.device("cpu"))
    assert sum(logged[f"tip/q{i}"] for i in (1, 2, 3, 4)) == pytest.approx(1.0)
    assert logged["tip/q1"] + logged["tip/q2"] == pytest.approx(0.5, abs=0.1)
    assert -1 <= logged["tip/rank_correlation"] <= 1


# --- runs ------------------------------------------------------------------------------------------------------------


def test_keeping_everything_changes_nothing_and_half_trains_half(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    states, metrics = {}, Metrics()
    for name, callbacks in (
        ("plain", []),
        ("all", [TokenImportance(1.0)]),
        ("half", [TokenImportance(0.5), metrics]),
    ):
        made = make_module(policy, OPD, teacher=Checkpoint(teacher), max_rollouts=2)
        train(tmp_path / name, made, callbacks)
        states[name] = final_state(made)
    assert_same_weights(states["plain"], states["all"])
    assert any(not torch.equal(states["plain"][n], states["half"][n]) for n in states["plain"])
    assert metrics.steps[0]["tip/kept_ratio"] == pytest.approx(0.5, abs=0.1)
    assert metrics.steps[0]["tip/entropy_kept"] > metrics.steps[0]["tip/entropy_dropped"]


def test_it_selects_tokens_of_kdrl_and_is_refused_without_a_teacher(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    train(
        tmp_path / "kdrl",
        make_module(policy, KDRL, teacher=Checkpoint(teacher), max_rollouts=1),
        [TokenImportance(0.5)],
    )
    with pytest.raises(Exception, match="GRPO has no teacher"):
        train(tmp_path / "grpo", make_module(policy, GRPO, max_rollouts=1), [TokenImportance(0.5)])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"keep": 0.0}, "keep"), ({"strategy": "best"}, "strategy"), ({"entropy_clip": 1.5}, "entropy_clip")],
)
def test_impossible_settings_are_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        TokenImportance(**options)
