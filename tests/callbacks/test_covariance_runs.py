# SPDX-License-Identifier: Apache-2.0
"""KL-Cov and Clip-Cov in runs of GRPO, the covariances that they act on, and the entropy law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from npo_runs import Diary, Numbers, guided_module

from lit_rl.callbacks import EntropyMonitor
from lit_rl.callbacks.entropy import fit_entropy_law
from lit_rl.hooks import RolloutCallback
from lit_rl.objectives import Clip, ClipCov, KLCov
from lit_rl.testing import assert_same_weights, check_neutral, check_resume, final_state, make_policy, train


def trained(folder: Path, name: str, callbacks: Any = (), **options: Any) -> Any:
    module = guided_module(make_policy(folder / "policy"), **options)
    train(folder / name, module, list(callbacks))
    return module


def test_the_first_update_of_kl_cov_has_no_penalty_and_later_ones_have(tmp_path: Path) -> None:
    one = {"max_rollouts": 1}
    penalised = trained(tmp_path, "a", surrogate=KLCov(fraction=0.2, beta=1.0), **one)
    free = trained(tmp_path, "b", surrogate=KLCov(fraction=0.2, beta=0.0), **one)
    assert_same_weights(final_state(penalised), final_state(free))
    two = {"max_rollouts": 1, "epochs_per_rollout": 2}
    penalised = trained(tmp_path, "c", surrogate=KLCov(fraction=0.2, beta=1.0), **two)
    free = trained(tmp_path, "d", surrogate=KLCov(fraction=0.2, beta=0.0), **two)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_weights(final_state(penalised), final_state(free))


def test_an_empty_band_makes_clip_cov_plain_clipping(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_rollouts": 2, "epochs_per_rollout": 2}
    empty = ClipCov(cov_low=5.0, cov_high=1.0, clip_low=0.2, clip_high=0.2)
    first = trained(tmp_path, "a", surrogate=empty, **options)
    second = trained(tmp_path, "b", surrogate=Clip(0.2, 0.2), **options)
    assert_same_weights(final_state(first), final_state(second))


class CountSelected(RolloutCallback):
    """How many tokens each optimizer step singles out, over all of its micro-batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Any) -> None:
        self.tokens = int(rollouts.kept_mask().sum())
        self.counts.append(0)

    def on_micro_batch(self, trainer: Any, module: Any, micro: Any, current: Any) -> None:
        self.counts[-1] += int(micro.token["selected"].sum())


@pytest.mark.parametrize("surrogate", [KLCov(fraction=0.1), ClipCov(fraction=0.1, cov_low=-9, cov_high=9)])
def test_the_share_is_taken_of_the_whole_mini_batch_however_it_is_split(tmp_path: Path, surrogate: Any) -> None:
    results = []
    for name, tokens in (("whole", 10**6), ("single", 1)):
        counter = CountSelected()
        options = {"max_rollouts": 1, "epochs_per_rollout": 2, "micro_batch_tokens": tokens}
        results.append(final_state(trained(tmp_path, name, [counter], surrogate=surrogate, **options)))
        assert counter.counts == [math.floor(0.1 * counter.tokens)] * 2
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-4)


def test_the_law_goes_through_two_points_and_gives_its_slope_and_ceiling() -> None:
    a, b = fit_entropy_law([0.0, math.log(2)], [0.4, 0.2])
    assert (a, b) == pytest.approx((0.2, 0.6))
    assert b - a == pytest.approx(0.4)  # the score at entropy 0
    step = 1e-6
    slope = (-a * math.exp(math.log(2) + step) + a * math.exp(math.log(2))) / step
    assert slope == pytest.approx(-0.4, abs=1e-5)
    noisy = [0.1, -0.1, 0.05, -0.05]
    entropies = [1.0, 0.7, 0.4, 0.2]
    scores = [-0.3 * math.exp(h) + 0.9 + 0.01 * e for h, e in zip(entropies, noisy)]
    assert fit_entropy_law(entropies, scores) == pytest.approx((0.3, 0.9), abs=0.02)
    with pytest.raises(ValueError, match="two different entropies"):
        fit_entropy_law([0.5, 0.5], [0.1, 0.2])


def test_logged_covariances_are_those_of_a_loop_over_tokens(tmp_path: Path) -> None:
    numbers, diary = Numbers(), Diary()
    monitor = EntropyMonitor(shares=[0.1, 1.0])
    trained(tmp_path, "run", [monitor, numbers, diary], max_rollouts=1, micro_batch_tokens=30)
    rollouts = diary.batches[0]
    pairs = []
    for row in range(len(rollouts)):
        if rollouts.advantages[row].any():
            for t in range(int(rollouts.lengths[row])):
                pairs.append((float(rollouts.logprobs["sampler"][row, t]), float(rollouts.advantages[row, t])))
    mean_l, mean_a = (sum(column) / len(pairs) for column in zip(*pairs))
    covariances = sorted(((x - mean_l) * (a - mean_a) for x, a in pairs), reverse=True)
    logged = numbers.logged[0]
    assert logged["covariance/mean"] == pytest.approx(sum(covariances) / len(pairs), abs=1e-5)
    assert logged["covariance/top_1"] == pytest.approx(logged["covariance/mean"])
    top = covariances[: max(1, math.floor(0.1 * len(pairs)))]
    assert logged["covariance/top_0.1"] == pytest.approx(sum(top) / len(top), abs=1e-4)


def test_each_validation_is_a_point_of_the_law(tmp_path: Path) -> None:
    monitor, numbers = EntropyMonitor(points=2), Numbers()
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=4)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    train(tmp_path / "run", module, [monitor, numbers], **options)
    assert len(monitor.seen) == 4
    entropies = numbers.series("policy/entropy")
    assert [entropy for entropy, _ in monitor.seen] == pytest.approx(entropies)
    ceilings = numbers.series("entropy_law/predicted_ceiling")
    assert len(ceilings) == 2  # known from the third step on
    a, b = fit_entropy_law(*zip(*monitor.seen[:3]))
    assert ceilings[-1] == pytest.approx(b - a, abs=1e-5)


def test_watching_leaves_the_run_untouched_and_resumes_exactly(tmp_path: Path) -> None:
    check_neutral(tmp_path / "neutral", lambda: [EntropyMonitor()])
    check_resume(tmp_path / "resume", lambda: [EntropyMonitor()], at=2)


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="shares"):
        EntropyMonitor(shares=[0.0])
    with pytest.raises(ValueError, match="points"):
        EntropyMonitor(points=1)
