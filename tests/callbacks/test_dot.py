# SPDX-License-Identifier: Apache-2.0
"""Dynamic outlier truncation against the paper's code, written as a loop, and its numbers."""

from __future__ import annotations

import math
import random
import re
import statistics
from pathlib import Path

import pytest
import torch
from callback_batches import NAN, Module, add_demonstrations, batch, grpo_advantages

from lit_rl.callbacks import AutoNPO, DynamicOutlierTruncation, DynamicSampling, PredictiveDynamicSampling
from lit_rl.rollouts import Rollouts
from lit_rl.testing import check_neutral, check_resume, make_module


def truncate(rollouts: Rollouts, **options: float) -> tuple[Rollouts, dict[str, float]]:
    """Run the hook; what it leaves and what it logs."""
    module = Module()
    DynamicOutlierTruncation(**options).on_rewards(None, module, rollouts)
    return rollouts, module.numbers()


def loop(lengths: list[int], correct: list[float], alpha: float, margin: float, min_success: float) -> list[int]:
    """Lengths after truncation of one group, as the authors' code computes them."""
    if sum(abs(z - 1) < 1e-6 for z in correct) / len(lengths) < min_success:
        return lengths
    deviation = statistics.stdev(lengths) if len(lengths) > 1 else 0.0
    cutoff = math.floor(statistics.mean(lengths) + alpha * deviation)
    out = []
    for n in lengths:
        least = max(int(margin * n), 16) if margin < 1 else margin
        out.append(cutoff if n - cutoff >= least else n)
    return out


def test_the_outlier_of_a_solved_group_is_cut_to_mean_plus_three_deviations() -> None:
    rollouts, logged = truncate(batch([[100] * 11 + [1000]], [[1.0] * 12]))
    assert rollouts.lengths.tolist() == [100] * 11 + [954]
    assert logged["dot/avg_cutoff"] == 954
    assert logged["dot/tokens_cut"] == 46
    assert logged["dot/truncated"] == pytest.approx(1 / 12)
    assert logged["dot/all_correct_ratio"] == 1
    assert logged["dot/skipped_by_margin"] == 0
    assert logged["dot/broken_answer_ratio"] == 1


def test_a_cut_of_fewer_tokens_than_the_margin_is_not_made() -> None:
    rollouts, logged = truncate(batch([[100] * 11 + [1000]], [[1.0] * 12]), min_margin=64)
    assert rollouts.lengths.tolist() == [100] * 11 + [1000]
    assert logged["dot/skipped_by_margin"] == pytest.approx(1 / 12)
    assert logged["dot/truncated"] == 0
    assert "dot/broken_answer_ratio" not in logged
    rollouts, logged = truncate(batch([[100] * 10 + [1000]], [[1.0] * 11]))
    assert rollouts.lengths.tolist() == [100] * 10 + [1000]
    assert logged["dot/avg_cutoff"] == 995
    assert logged["dot/skipped_by_margin"] == pytest.approx(1 / 11)


def test_a_group_of_32_with_one_outlier_loses_790_tokens() -> None:
    rollouts, logged = truncate(batch([[200] * 31 + [2000]], [[1.0] * 32]))
    assert rollouts.lengths.tolist() == [200] * 31 + [1210]
    assert logged["dot/tokens_cut"] == 790


@pytest.mark.parametrize("margin", [1, 16, 32, 0.05, 0.3])
@pytest.mark.parametrize("min_success", [1.0, 0.8])
def test_lengths_equal_those_of_the_loop_over_groups(margin: float, min_success: float) -> None:
    rng = random.Random(int(margin * 100))
    lengths = [[int(rng.lognormvariate(4, 1)) + 1 for _ in range(rng.randint(1, 20))] for _ in range(40)]
    correct = [[float(rng.random() < 0.95) for _ in group] for group in lengths]
    rollouts, logged = truncate(batch(lengths, correct), alpha=1.5, min_margin=margin, min_success=min_success)
    expected = [n for pair in zip(lengths, correct) for n in loop(*pair, 1.5, margin, min_success)]
    assert rollouts.lengths.tolist() == expected
    assert logged["dot/tokens_cut"] == sum(map(sum, lengths)) - sum(expected) > 0


def test_groups_that_are_not_solved_or_have_no_outlier_stay_as_they_are() -> None:
    outlier = [10] * 15 + [1000]
    rollouts = batch(
        [outlier, outlier, outlier, [500], [70] * 16, outlier],
        [[1.0] * 14 + [0.0, 1.0], [0.0] * 16, [1.0] * 15 + [NAN], [1.0], [1.0] * 16, [0.0] * 15 + [1.0]],
    )
    before = rollouts.clone()
    rollouts, logged = truncate(rollouts)
    assert rollouts.diff(before) == {}
    assert logged["dot/truncated"] == 0


def test_truncation_touches_lengths_ends_and_loss_weights_only() -> None:
    rollouts = batch([[50] * 15 + [500], [20] * 16], [[1.0] * 16] * 2)
    before = rollouts.clone()
    rollouts, _ = truncate(rollouts)
    cut = int(rollouts.lengths[15])
    changed = {"lengths", "finished", "stop_reason", "loss_weights", "correct", "reward_terms.exact"}
    assert set(rollouts.diff(before)) == changed
    assert torch.equal(rollouts.completion_ids, before.completion_ids)
    assert torch.equal(rollouts.completion_mask, before.completion_mask)
    assert torch.equal(rollouts.loss_weights[15, :cut], before.loss_weights[15, :cut])
    assert rollouts.loss_weights[15, cut:].count_nonzero() == 0
    assert torch.equal(rollouts.loss_weights[:15], before.loss_weights[:15])
    assert (rollouts.lengths <= before.lengths).all()


def test_only_the_broken_outlier_is_pushed_down() -> None:
    size = 32
    rollouts, _ = truncate(batch([[200] * (size - 1) + [2000]], [[1.0] * size]))
    advantages = grpo_advantages(rollouts.rewards, rollouts.group)
    assert advantages[0] == pytest.approx(1 / math.sqrt(size), abs=1e-4)
    assert advantages[-1] == pytest.approx(-(size - 1) / math.sqrt(size), abs=1e-3)
    assert float(advantages[0]) == pytest.approx(0.1768, abs=1e-4)
    assert float(advantages[-1]) == pytest.approx(-5.4801, abs=1e-3)


def test_a_cut_completion_that_is_still_right_leaves_the_group_without_signal() -> None:
    module = Module()
    module.rescore = lambda rollouts, rows: None
    rollouts = batch([[200] * 31 + [2000]], [[1.0] * 32])
    DynamicOutlierTruncation().on_rewards(None, module, rollouts)
    assert rollouts.lengths[-1] == 1210
    assert module.numbers()["dot/broken_answer_ratio"] == 0
    assert grpo_advantages(rollouts.rewards, rollouts.group).count_nonzero() == 0


def test_only_rows_that_were_cut_are_scored_again() -> None:
    module = Module()
    rollouts = batch([[50] * 15 + [500], [20] * 16], [[1.0] * 16] * 2)
    DynamicOutlierTruncation().on_rewards(None, module, rollouts)
    assert module.rescored == [15]


@pytest.mark.parametrize("verdict", [NAN, 1.0])
def test_demonstrations_are_neither_cut_nor_counted(verdict: float) -> None:
    plain, expected = truncate(batch([[100] * 11 + [1000], [30] * 12], [[1.0] * 12, [0.0] * 12]))
    mixed = add_demonstrations(
        batch([[100] * 11 + [1000], [30] * 12], [[1.0] * 12, [0.0] * 12]), [1500, 3, 700], verdict
    )
    before = mixed.clone()
    mixed, logged = truncate(mixed)
    assert mixed.lengths.tolist() == [*plain.lengths.tolist(), 1500, 3, 700]
    assert torch.equal(mixed.loss_weights[-3:], before.loss_weights[-3:])
    assert {k: v for k, v in logged.items() if k != "dot/avg_cutoff"} == {
        k: v for k, v in expected.items() if k != "dot/avg_cutoff"
    }
    assert logged["dot/avg_cutoff"] == expected["dot/avg_cutoff"]


@pytest.mark.parametrize(("size", "largest"), [(8, 2.475), (10, 2.846), (11, 3.015), (32, 5.480)])
def test_setup_says_which_alpha_can_fire_in_a_group_of_this_size(size: int, largest: float) -> None:
    callback = DynamicOutlierTruncation(alpha=largest + 0.001)
    with pytest.raises(ValueError, match=re.escape(f"{largest:.3f}")):
        callback.check_setup(Module([callback], group_size=size))
    callback = DynamicOutlierTruncation(alpha=largest - 0.001)
    callback.check_setup(Module([callback], group_size=size))


def test_the_largest_z_score_is_reached_by_one_outlier_among_equals() -> None:
    for size in (8, 10, 11, 32):
        lengths = [10] * (size - 1) + [1000]
        z = (1000 - statistics.mean(lengths)) / statistics.stdev(lengths)
        assert z == pytest.approx((size - 1) / math.sqrt(size))


def test_a_list_that_drops_solved_groups_first_is_refused() -> None:
    dot, dynamic = DynamicOutlierTruncation(), DynamicSampling()
    with pytest.raises(ValueError, match="list DynamicOutlierTruncation before DynamicSampling"):
        dot.check_setup(Module([dynamic, dot]))
    dot.check_setup(Module([dot, dynamic]))
    dot.check_setup(Module([DynamicSampling(enabled=False), dot]))
    dot.check_setup(Module([PredictiveDynamicSampling(), dot]))  # it drops groups later, whatever the order


@pytest.mark.parametrize("options", [{"alpha": -1}, {"min_margin": 0}, {"min_success": 0}, {"min_success": 1.1}])
def test_arguments_without_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DynamicOutlierTruncation(**options)


def test_an_infinite_alpha_leaves_the_run_untouched(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [DynamicOutlierTruncation(alpha=math.inf)])


def eager() -> list[DynamicOutlierTruncation]:
    return [DynamicOutlierTruncation(alpha=0.5, min_margin=1, min_success=0.25)]


def test_a_run_that_cuts_resumes_exactly(tmp_path: Path) -> None:
    check_resume(tmp_path, eager, lambda policy: make_module(policy, max_rollouts=5), at=2)


def test_it_works_together_with_a_guide_in_any_order() -> None:
    dot, npo = DynamicOutlierTruncation(), AutoNPO()
    for order in ([dot, npo], [npo, dot]):
        for callback in order:
            callback.check_setup(Module(order))
