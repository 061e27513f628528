# SPDX-License-Identifier: Apache-2.0
"""PACED: the kernel's numbers, the normalisation inside a loss, running estimates that are saved and shared."""

import math
from pathlib import Path

import pytest
import torch
from lessons import Method, Metrics, exact_module, scored, told_the_answer

from lit_rl.callbacks import PACED
from lit_rl.callbacks.paced import frontier_weights
from lit_rl.methods import OPD
from lit_rl.objectives import Aggregation, aggregation_weights
from lit_rl.policies import Live
from lit_rl.testing import assert_same_weights, check_resume, final_state, make_module, make_policy, train

NAN = math.nan


def test_kernel_at_eight_completions():
    found = frontier_weights(torch.arange(9) / 8)
    assert found.tolist() == [0, 0.109375, 0.1875, 0.234375, 0.25, 0.234375, 0.1875, 0.109375, 0]


@pytest.mark.parametrize(
    ("alpha", "beta", "mode", "maximum"),
    [(1, 1, 0.5, 0.25), (2, 1, 2 / 3, 0.148148), (1, 2, 1 / 3, 0.148148), (0.5, 0.5, 0.5, 0.5)],
)
def test_mode_and_maximum(alpha, beta, mode, maximum):
    rates = torch.linspace(0, 1, 1001, dtype=torch.float64)
    weights = frontier_weights(rates, alpha, beta)
    assert float(rates[weights.argmax()]) == pytest.approx(mode, abs=1e-3)
    assert float(frontier_weights(torch.tensor(mode).double(), alpha, beta)) == pytest.approx(maximum, abs=1e-6)
    torch.testing.assert_close(weights, frontier_weights(1 - rates, beta, alpha))


def test_limits_of_the_exponents():
    rates = torch.tensor([0.0, 0.3, 1.0, NAN])
    assert frontier_weights(rates, 0, 0).tolist() == [1, 1, 1, 0]
    assert frontier_weights(rates, 1e-9, 1e-9).round().tolist() == [0, 1, 0, 0], "the hard filter"


@pytest.mark.parametrize(("rate", "expected"), [(0.1, 0.07875), (0.3, 0.18375), (0.5, 0.21875)])
def test_a_measured_rate_underestimates_the_kernel_by_a_constant(rate, expected):
    mean = sum(
        math.comb(8, k) * rate**k * (1 - rate) ** (8 - k) * float(frontier_weights(torch.tensor(k / 8)))
        for k in range(9)
    )
    assert mean == pytest.approx(expected, abs=1e-6)


# --- inside a loss ---------------------------------------------------------------------------------------------------


def verdicts(passed: list[int], of: int = 8) -> list[list[float]]:
    return [[1.0] * k + [0.0] * (of - k) for k in passed]


def weighed(callback: PACED, correct: list[list[float]], **options):
    module, batch = Method(**options), scored(correct)
    callback.on_batch_ready(None, module, batch)
    callback.on_loss_weights(None, module, batch)
    return batch, module


@pytest.mark.parametrize("normalize", ["mean", "none"])
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_the_loss_is_the_weighted_mean_over_all_prompts_whatever_the_aggregation(normalize, aggregation):
    """(1/B) sum_b w_b L_b, with prompts of weight 0 in B; under "mean" the weights of (0,1,3,6,8)/8 are the card's."""
    batch, _ = weighed(PACED(normalize=normalize), verdicts([0, 1, 3, 6, 8]), aggregation=aggregation)
    values = torch.rand(batch.loss_weights.shape, generator=torch.Generator().manual_seed(0))
    weights, count = aggregation_weights(batch.loss_weights, aggregation, 40)
    found = float((values * weights).sum() / count)
    raw = torch.tensor([0, 0.109375, 0.234375, 0.1875, 0])
    per_prompt = raw / raw.mean() if normalize == "mean" else raw
    if normalize == "mean":
        assert per_prompt.tolist() == pytest.approx([0, 1.029412, 2.205882, 1.764706, 0], abs=1e-6)
    full, everyone = aggregation_weights(torch.ones_like(values), aggregation, 40)
    rows = (values * full).sum(1) * per_prompt[batch.group]
    assert found == pytest.approx(float(rows.sum() / everyone), rel=1e-5)


def test_a_constant_factor_of_all_weights_changes_nothing_under_mean():
    """Exponents that scale every weight of this batch alike leave the loss weights as they are."""
    correct = verdicts([4, 4])
    first, _ = weighed(PACED(1, 1), correct)
    second, _ = weighed(PACED(3, 3), correct)
    torch.testing.assert_close(first.loss_weights, second.loss_weights)
    assert first.loss_weights.unique().tolist() == [1.0]
    raw = [weighed(PACED(a, a, normalize="none"), correct)[0].loss_weights.unique().item() for a in (1, 3)]
    assert raw == pytest.approx([0.25, 0.25**3])


@pytest.mark.parametrize("passed", [[0, 0], [8, 8], [0, 8]])
def test_a_batch_without_a_frontier_trains_nothing_and_has_no_nan(passed):
    batch, module = weighed(PACED(), verdicts(passed))
    assert batch.loss_weights.eq(0).all()
    assert module.logged()["paced/zero_ratio"] == 1.0
    assert module.logged()["paced/effective_share"] == 0.0


def test_a_prompt_without_verdicts_has_no_weight_and_is_counted():
    batch, module = weighed(PACED(), [[NAN, NAN], [1.0, 0.0], [NAN, 1.0]])
    assert batch.loss_weights[:, 0].tolist() == [0, 0, pytest.approx(1 / 3 * 3), pytest.approx(1 / 3 * 3), 0, 0]
    assert module.logged()["paced/unknown_ratio"] == pytest.approx(1 / 3)
    bins = {name: value for name, value in module.logged().items() if name.startswith("paced/rate_")}
    assert [*bins.values()] == [0, 0, 0.5, 0.5]  # of the two prompts whose rates, 0.5 and 1, are known
    assert "paced/rate_0.75_to_1" in bins


def test_neutral_exponents_leave_a_run_as_it_is(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    states = []
    for name, callbacks in (("plain", []), ("paced", [PACED(0, 0)])):
        module = make_module(policy, OPD, teacher=told_the_answer(Live()), group_size=4, max_rollouts=2)
        train(tmp_path / name, module, callbacks)
        states.append(final_state(module))
    assert_same_weights(*states)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_running_estimate_starts_with_the_first_measurement_and_forgets_slowly():
    callback = PACED(memory=0.75)
    for passed, expected in ((8, 1.0), (0, 0.75), (4, 0.6875)):
        module, batch = Method(), scored(verdicts([passed]))
        callback.on_batch_ready(None, module, batch)
        assert callback.rates == {100: pytest.approx(expected)}
        assert float(batch.row["paced_weight"][0]) == pytest.approx(expected * (1 - expected))
    batch = scored([[NAN, NAN]])
    callback.on_batch_ready(None, Method(), batch)
    assert callback.rates == {100: pytest.approx(0.6875)}, "no verdict, no news"


def test_uids_are_exact_whatever_their_size():
    callback, batch = PACED(memory=0.5), scored([[1.0, 0.0], [1.0, 1.0]])
    batch.prompts.uid = torch.tensor([2**62 + 1, 2**62])
    callback.on_batch_ready(None, Method(), batch)
    assert callback.rates == {2**62 + 1: 0.5, 2**62: 1.0}


def distilled(policy: Path) -> OPD:
    return make_module(policy, OPD, teacher=told_the_answer(Live()), group_size=4)


def test_a_run_resumes_exactly_with_its_estimates(tmp_path: Path):
    check_resume(tmp_path, callbacks=lambda: [PACED(memory=0.5)], module=distilled)


def test_it_weighs_policy_gradients_too(tmp_path: Path):
    metrics = Metrics()
    exact = exact_module(tmp_path, OPD, teacher=told_the_answer(Live()), loss="policy_gradient")
    module = make_module(tmp_path / "policy", OPD, teacher=told_the_answer(Live()), loss="policy_gradient",
                         group_size=4, max_rollouts=1)  # fmt: skip
    train(tmp_path / "paced", module, [PACED(), metrics])
    assert exact is not module
    assert 0 <= metrics.steps[0]["paced/weight"] <= 0.25


@pytest.mark.parametrize(
    ("options", "match"),
    [({"alpha": -1}, "alpha"), ({"normalize": "sum"}, "normalize"), ({"memory": 1.0}, "memory")],
)
def test_impossible_settings_are_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        PACED(**options)


def test_one_completion_measures_no_rate():
    with pytest.raises(ValueError, match="group_size is 1"):
        PACED().check_setup(Method(group_size=1))
    PACED(memory=0.9).check_setup(Method(group_size=1))
