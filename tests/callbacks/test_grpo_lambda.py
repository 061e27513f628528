# SPDX-License-Identifier: Apache-2.0
"""GRPO-λ against the numbers of its formulas, a loop over groups, and its limits."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path

import pytest
import torch
from callback_batches import NAN, Module, add_demonstrations, batch, grpo_advantages

from lit_rl.callbacks import RECAP, DynamicSampling, GRPOLambda, Objective, PredictiveDynamicSampling
from lit_rl.rewards import FunctionReward
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.testing import check_neutral, check_resume, make_module


def penalise(rollouts: Rollouts, **options: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Rewards after the callback, and what it logs."""
    callback = GRPOLambda(**options)
    module = Module([callback])
    callback.check_setup(module)
    callback.on_batch_ready(None, module, rollouts)
    return rollouts.rewards, module.numbers()


def loop(lengths: list[list[int]], correct: list[list[float]], fraction: float, alpha: float) -> list[float]:
    """Rewards as the formulas define them, group by group."""
    accuracy = [sum(z) / len(z) for z in correct]
    best = sorted(range(len(accuracy)), key=lambda k: -accuracy[k])[: math.ceil(round(fraction * len(accuracy), 9))]
    out = []
    for k, (group, verdict) in enumerate(zip(lengths, correct)):
        right = [n for n, z in zip(group, verdict) if z == 1]
        mean = sum(right) / len(right) if right else 0.0
        deviation = math.sqrt(sum((n - mean) ** 2 for n in right) / len(right)) if right else 0.0
        for n, z in zip(group, verdict):
            argument = (n - mean) / max(deviation, 1e-4)
            out.append(z * (1 - alpha / (1 + math.exp(-max(min(argument, 50), -50))) if k in best else 1.0))
    return out


def test_rewards_of_a_selected_group_are_those_of_the_formula() -> None:
    rewards, _ = penalise(batch([[100, 200, 300]], [[1.0] * 3]), fraction=1)
    assert rewards.tolist() == pytest.approx([0.8637, 0.7, 0.5363], abs=1e-4)
    rewards, _ = penalise(batch([[100, 200, 300]], [[1.0] * 3]), fraction=1, ddof=1)
    assert rewards.tolist() == pytest.approx([0.8386, 0.7, 0.5614], abs=1e-4)


def test_a_wrong_completion_gets_nothing_and_advantages_are_those_of_the_formula() -> None:
    rollouts = batch([[100, 200, 300, 5]], [[1.0, 1.0, 1.0, 0.0]])
    rewards, logged = penalise(rollouts, fraction=1)
    assert rewards.tolist() == pytest.approx([0.8637, 0.7, 0.5363, 0.0], abs=1e-4)
    advantages = grpo_advantages(rewards, rollouts.group, ddof=0)
    assert advantages.tolist() == pytest.approx([1.0440, 0.5393, 0.0347, -1.6180], abs=1e-4)
    assert logged["grpo_lambda/penalty_mean"] == pytest.approx(0.3, abs=1e-6)
    assert logged["grpo_lambda/acc_threshold"] == 0.75
    assert logged["grpo_lambda/len_selected"] == pytest.approx(151.25)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.35, 1.0])
def test_rewards_equal_those_of_the_loop_over_groups(fraction: float) -> None:
    rng = random.Random(7)
    lengths = [[rng.randint(1, 400) for _ in range(rng.randint(1, 9))] for _ in range(23)]
    correct = [[float(rng.random() < 0.6) for _ in group] for group in lengths]
    rewards, logged = penalise(batch(lengths, correct), fraction=fraction)
    assert rewards.tolist() == pytest.approx(loop(lengths, correct, fraction, 0.6), abs=1e-5)
    if fraction:
        assert logged["grpo_lambda/selected_fraction"] == pytest.approx(math.ceil(fraction * 23) / 23)


def test_every_number_is_logged() -> None:
    _, logged = penalise(batch([[10, 20], [30, 50], [7, 9]], [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), fraction=0.3)
    assert {k: v for k, v in logged.items() if k.startswith("grpo_lambda/")} == {
        "grpo_lambda/selected_fraction": pytest.approx(1 / 3),
        "grpo_lambda/acc_threshold": 1.0,
        "grpo_lambda/len_selected": 15.0,
        "grpo_lambda/len_rest": 24.0,
        "grpo_lambda/penalty_mean": pytest.approx(0.3, abs=1e-6),
    }


@pytest.mark.parametrize(("groups", "selected"), [(5, 1), (7, 2), (10, 2), (1, 1)])
def test_a_fifth_of_the_groups_is_selected_rounded_up(groups: int, selected: int) -> None:
    assert int(GRPOLambda(fraction=0.2).choose(torch.rand(groups)).sum()) == selected


def test_ties_are_broken_by_drawing_order_and_groups_without_a_verdict_are_not_ranked() -> None:
    accuracy = torch.tensor([NAN, 0.5, 1.0, NAN, 0.5, 0.5])
    assert GRPOLambda(fraction=0.5).choose(accuracy).tolist() == [False, True, True, False, False, False]
    assert GRPOLambda(fraction=1.0).choose(accuracy).tolist() == [False, True, True, False, True, True]
    assert GRPOLambda(threshold=0.5).choose(accuracy).tolist() == [False, True, True, False, True, True]


def test_raising_the_accuracy_of_a_group_only_moves_it_toward_the_selection() -> None:
    accuracy = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3])
    callback = GRPOLambda(fraction=0.4)
    was_in = False
    for value in torch.linspace(0, 1, 21):
        accuracy[2] = value
        is_in = bool(callback.choose(accuracy)[2])
        assert is_in >= was_in
        was_in = is_in
    assert was_in


def test_permuting_groups_permutes_rewards() -> None:
    lengths = [[10, 30, 20], [5, 9, 40], [8, 8, 90]]
    correct = [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    rewards, _ = penalise(batch(lengths, correct), fraction=0.5)
    order = [2, 0, 1]
    permuted, _ = penalise(batch([lengths[k] for k in order], [correct[k] for k in order]), fraction=0.5)
    assert torch.equal(permuted.reshape(3, 3), rewards.reshape(3, 3)[order])


def test_a_shorter_correct_completion_is_never_worth_less_and_always_more_than_a_wrong_one() -> None:
    rng = random.Random(1)
    lengths = [sorted(rng.randint(1, 500) for _ in range(16))]
    correct = [[float(rng.random() < 0.7) for _ in range(16)]]
    rewards, _ = penalise(batch(lengths, correct), fraction=1, alpha=0.99)
    right = rewards[torch.tensor(correct[0]) == 1]
    assert (right.diff() <= 0).all()
    assert right.min() > rewards[torch.tensor(correct[0]) == 0].max() == 0


def test_a_completion_of_average_length_loses_half_of_alpha() -> None:
    for lengths in ([[50]], [[50, 50, 50]]):
        rewards, _ = penalise(batch(lengths, [[1.0] * len(lengths[0])]), fraction=1, alpha=0.6)
        assert rewards.tolist() == pytest.approx([0.7] * len(lengths[0]))


def test_a_group_that_is_all_wrong_gets_zero_rewards_and_advantages() -> None:
    rollouts = batch([[10, 20, 30]], [[0.0] * 3])
    rewards, _ = penalise(rollouts, fraction=1)
    assert rewards.tolist() == [0.0] * 3
    assert grpo_advantages(rewards, rollouts.group).tolist() == [0.0] * 3


def test_a_solved_group_of_equal_lengths_gets_no_advantage() -> None:
    rollouts = batch([[10] * 4], [[1.0] * 4])
    rewards, _ = penalise(rollouts, fraction=1)
    assert rewards.tolist() == pytest.approx([0.7] * 4)
    assert grpo_advantages(rewards, rollouts.group).tolist() == [0.0] * 4


def test_in_a_solved_group_the_shortest_completion_has_the_largest_advantage() -> None:
    rollouts = batch([[30, 10, 20]], [[1.0] * 3])
    rewards, _ = penalise(rollouts, fraction=1)
    assert grpo_advantages(rewards, rollouts.group).argsort(descending=True).tolist() == [1, 2, 0]


@pytest.mark.parametrize("verdict", [NAN, 1.0])
def test_demonstrations_are_neither_ranked_nor_penalised(verdict: float) -> None:
    lengths, correct = [[10, 30], [20, 90], [5, 6], [7, 8]], [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    alone, expected = penalise(batch(lengths, correct), fraction=0.5)
    mixed = add_demonstrations(batch(lengths, correct), [400, 3, 80, 12], verdict)
    rewards, logged = penalise(mixed, fraction=0.5)
    assert torch.equal(rewards[:8], alone)
    assert mixed.row["reward_terms.length_penalty"][8:].count_nonzero() == 0
    assert logged == expected


def test_a_demonstration_inside_a_group_has_no_part_in_its_accuracy_and_lengths() -> None:
    plain, _ = penalise(batch([[100, 200, 300]], [[1.0] * 3]), fraction=1)
    mixed = batch([[100, 200, 300, 5000]], [[1.0] * 4])
    mixed.row["origin"][3] = Origin.DEMONSTRATION
    rewards, logged = penalise(mixed, fraction=1)
    assert torch.equal(rewards[:3], plain)
    assert rewards[3] == 1
    assert logged["grpo_lambda/acc_threshold"] == 1


def test_the_penalty_is_a_reward_term_of_its_own_and_follows_the_weight_of_the_verifier() -> None:
    rollouts = batch([[100, 200, 300, 5]], [[1.0, 1.0, 1.0, 0.0]], weight=0.25)
    rewards, _ = penalise(rollouts, fraction=1)
    assert rollouts.reward_terms["exact"].tolist() == [1, 1, 1, 0]
    assert rollouts.correct.tolist() == [1, 1, 1, 0]
    assert rewards.tolist() == pytest.approx([0.25 * r for r in (0.8637, 0.7, 0.5363, 0.0)], abs=1e-4)


@pytest.mark.parametrize("recap_first", [True, False])
def test_weights_of_recap_scale_reward_and_penalty_alike_in_any_order(recap_first: bool) -> None:
    recap = RECAP([Objective("accuracy", "reward/exact", "reward")])
    recap.weights["accuracy"] = 0.5
    penalty, module = GRPOLambda(fraction=1), Module()
    penalty.check_setup(module)
    rollouts = batch([[100, 200, 300]], [[1.0] * 3])
    callbacks = [recap, penalty] if recap_first else [penalty, recap]
    for hook in ("on_rewards", "on_batch_ready"):
        for callback in callbacks:
            getattr(callback, hook)(None, module, rollouts)
    assert rollouts.rewards.tolist() == pytest.approx([0.5 * r for r in (0.8637, 0.7, 0.5363)], abs=1e-4)


def test_setup_warns_where_a_filter_drops_the_solved_groups_first() -> None:
    penalty = GRPOLambda()
    for before in ([DynamicSampling(), penalty], [penalty, DynamicSampling()], [PredictiveDynamicSampling(), penalty]):
        with pytest.warns(UserWarning, match="drops the groups that are solved in full"):
            penalty.check_setup(Module(before))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty.check_setup(Module([penalty, PredictiveDynamicSampling()]))


def test_a_verifier_without_weight_is_refused() -> None:
    reward = FunctionReward(lambda rows: [0.0] * len(rows), name="exact", verifier=True, weight=0.0)
    with pytest.raises(ValueError, match="weight is 0"):
        GRPOLambda().check_setup(Module(rewards=[reward]))


@pytest.mark.parametrize(
    "options", [{"fraction": 1.2}, {"fraction": -0.1}, {"alpha": 1.0}, {"alpha": -0.1}, {"ddof": 2}]
)
def test_arguments_without_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GRPOLambda(**options)


def test_without_groups_or_without_strength_the_run_is_plain_grpo(tmp_path: Path) -> None:
    check_neutral(tmp_path / "fraction", lambda: [GRPOLambda(fraction=0)])
    check_neutral(tmp_path / "alpha", lambda: [GRPOLambda(alpha=0)])


def test_a_penalised_run_resumes_exactly(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: [GRPOLambda(fraction=0.5)], lambda policy: make_module(policy, max_rollouts=5), at=2)
