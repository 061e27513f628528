# SPDX-License-Identifier: Apache-2.0
"""Uni-OPD: margins, shifts, the greedy mask and the balance of the card, on hand-made batches and in a run."""

import math
from pathlib import Path

import pytest
import torch
from lessons import Method, Metrics, scored, told_the_answer

from lit_rl.callbacks import MarginCalibration, UniOPDBalance
from lit_rl.callbacks.margin import greedy_mask, margin_of
from lit_rl.callbacks.outcome_balance import surplus
from lit_rl.methods import GOPD, OPD
from lit_rl.policies import Checkpoint, FrozenCopy, Live
from lit_rl.testing import assert_same_weights, check_resume, final_state, make_module, make_policy, train

NAN = math.nan
GUIDANCE, RIGHT = [-0.5, -0.2, -0.1, -0.4], [True, True, False, False]


def calibrated(callback: MarginCalibration, guidance, correct, length: int = 4, groups: int = 1):
    """Mean advantage of each row after the hook, and the batch."""
    size = len(guidance) // groups
    batch = scored([correct[g * size : (g + 1) * size] for g in range(groups)], length)
    pattern = torch.linspace(-0.3, 0.3, length)
    batch.advantages = torch.tensor(guidance)[:, None] + pattern
    batch.logprobs["old"] = torch.full((len(guidance), length), -2.0)
    batch.logprobs["teacher"] = batch.logprobs["old"] + batch.advantages
    module = Method()
    callback.on_advantages(None, module, batch)
    return batch.advantages.mean(1).tolist(), batch, module


def test_margins():
    assert margin_of(GUIDANCE, RIGHT, "mean") == pytest.approx(-0.1)
    assert margin_of(GUIDANCE, RIGHT, "minmax") == pytest.approx(-0.4)
    assert math.isnan(margin_of([1.0, 2.0], [True, True], "mean"))


@pytest.mark.parametrize(
    ("options", "expected", "after"),
    [
        ({"shift": "correct_up"}, (0, 0.3, -0.1, -0.4), 0.4),
        ({"shift": "incorrect_down"}, (-0.5, -0.2, -0.6, -0.9), 0.4),
        ({"shift": "both"}, (-0.25, 0.05, -0.35, -0.65), 0.4),
        ({"shift": "correct_up", "mode": "minmax", "margin": 0.0}, (-0.1, 0.2, -0.1, -0.4), 0.0),
    ],
)
def test_shifts_reach_the_margin_exactly_and_keep_the_pattern_within_a_row(options, expected, after):
    callback = MarginCalibration(**options)
    found, batch, module = calibrated(callback, GUIDANCE, [1.0, 1, 0, 0])
    assert found == pytest.approx(expected, abs=1e-6)
    assert margin_of(found, RIGHT, callback.mode) == pytest.approx(after, abs=1e-6)
    assert module.logged()["margin/after"] == pytest.approx(after, abs=1e-6)
    assert module.logged()["margin/violated_ratio"] == 1.0
    differences = batch.advantages[:, 1:] - batch.advantages[:, :-1]
    torch.testing.assert_close(differences, torch.full_like(differences, 0.2))
    again, *_ = calibrated(callback, found, [1.0, 1, 0, 0])
    assert again == pytest.approx(found, abs=1e-6), "a second call changes nothing"


@pytest.mark.parametrize("correct", [[1.0] * 4, [0.0] * 4, [1.0, NAN, NAN, NAN], [NAN] * 4])
def test_without_both_kinds_nothing_moves(correct):
    found, _, module = calibrated(MarginCalibration(), GUIDANCE, correct)
    assert found == pytest.approx(GUIDANCE)
    assert "margin/before" not in module.logged()


def test_rows_without_a_verdict_belong_to_neither_side_and_stay():
    found, *_ = calibrated(MarginCalibration(shift="correct_up"), [*GUIDANCE, 7.0], [1.0, 1, 0, 0, NAN])
    assert found == pytest.approx([0, 0.3, -0.1, -0.4, 7.0], abs=1e-6)


def test_groups_are_calibrated_apart_or_together():
    guidance, correct = [0.9, 0.0, -0.5, -0.4], [1.0, 0, 1, 0]
    apart, *_ = calibrated(MarginCalibration(shift="correct_up"), guidance, correct, groups=2)
    assert apart == pytest.approx([0.9, 0.0, 0.0, -0.4], abs=1e-6)
    together, *_ = calibrated(MarginCalibration(shift="correct_up", scope="global"), guidance, correct, groups=2)
    assert together == pytest.approx(guidance, abs=1e-6), "0.2 - (-0.2) is 0.4 already"


def test_greedy_mask_of_six():
    guidance, right = [-0.5, -0.2, -0.1, -0.1, -0.4, -0.3], [True] * 3 + [False] * 3
    removed = greedy_mask(guidance, right, 0.4, "mean", 0.25)
    margins = []
    for k in range(1, len(removed) + 1):
        left = [i for i in range(6) if i not in removed[:k]]
        margins.append(margin_of([guidance[i] for i in left], [right[i] for i in left], "mean"))
    assert margins == pytest.approx([0.116667, 0.2, 0.25, 0.3], abs=1e-6)
    assert removed[:2] == [0, 3]
    assert sorted(removed) == [0, 1, 3, 5], "one of each kind stays"


@pytest.mark.parametrize(("target", "expected"), [(0.4, [2, 0]), (0.0, [2])])
def test_greedy_mask_of_four_stops_at_the_margin_or_the_last_of_a_kind(target, expected):
    assert greedy_mask(GUIDANCE, RIGHT, target, "mean", 0.25) == expected


def test_masked_rows_lose_their_advantages_but_still_count():
    found, batch, module = calibrated(MarginCalibration(method="mask"), GUIDANCE, [1.0, 1, 0, 0])
    assert found == pytest.approx([0.0, -0.2, 0.0, -0.4], abs=1e-6)
    assert batch.advantages[0].eq(0).all()
    assert batch.loss_weights.eq(1).all()
    assert module.logged()["margin/silenced"] == 2


def test_tokens_on_which_policy_and_teacher_are_worlds_apart_are_cut_after_the_shift():
    batch = scored([[1.0, 1, 0, 0]])
    batch.logprobs["old"] = torch.full((4, 4), -2.0)
    batch.logprobs["teacher"] = torch.full((4, 4), -2.5)
    batch.logprobs["teacher"][0, 1] = -12.0  # exactly 10 apart
    batch.logprobs["teacher"][2, 2] = NAN  # the teacher failed
    batch.advantages = (batch.logprobs["teacher"] - batch.logprobs["old"]).nan_to_num(0.0)
    module = Method()
    MarginCalibration(margin=0.4).on_advantages(None, module, batch)
    assert batch.advantages[0, 1] == 0
    assert batch.advantages[2, 2] == 0
    assert (batch.advantages[0, [0, 2, 3]] != 0).all()
    assert module.logged()["margin/apart_ratio"] == pytest.approx(2 / 16)
    uncut = scored([[1.0, 1, 0, 0]])
    uncut.token |= {k: v.clone() for k, v in batch.token.items()}
    MarginCalibration(max_gap=None).on_advantages(None, Method(), uncut)
    assert uncut.advantages[2, 2] == 0


# --- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "left"),
    [
        (12, 4, 1, (4, 4)),
        (3, 13, 1, (3, 3)),
        (8, 8, 1, (8, 8)),
        (16, 0, 1, (16, 0)),
        (0, 16, 1, (0, 16)),
        (12, 4, 2, (8, 4)),
        (3, 13, 2, (3, 1)),
        (12, 4, 0.5, (2, 4)),
        (3, 13, 0.5, (3, 6)),
        (1, 1, 0.5, (1, 1)),
        (5, 3, 0, (0, 3)),
        (5, 3, math.inf, (5, 0)),
    ],
)
def test_balance(right, wrong, ratio, left):
    dropped = surplus(right, wrong, ratio)
    assert (right - dropped[0], wrong - dropped[1]) == left
    batch = scored([[1.0] * right + [0.0] * wrong])
    result = UniOPDBalance(ratio).on_batch_ready(None, Method(), batch)
    kept = batch if result is None else result
    assert (int((kept.correct == 1).sum()), int((kept.correct == 0).sum())) == left


def test_the_choice_repeats_and_is_random():
    def survivors(seed: int) -> list[int]:
        batch = scored([[1.0] * 12 + [0.0] * 4])
        return UniOPDBalance().on_batch_ready(None, Method(seed=seed), batch).row["sample"].tolist()

    assert survivors(0) == survivors(0)
    assert len({tuple(survivors(seed)) for seed in range(20)}) > 10


def test_scopes_and_unknown_verdicts():
    correct = [[1.0, 1, 1, 0], [0.0, 0, 0, NAN]]
    per_prompt = UniOPDBalance().on_batch_ready(None, Method(), scored(correct))
    assert per_prompt.correct.nan_to_num(0).tolist() == [1, 0, 0, 0, 0, 0], "the second group has one kind only"
    whole = UniOPDBalance(scope="global").on_batch_ready(None, Method(), scored(correct))
    assert (int((whole.correct == 1).sum()), len(whole)) == (3, 6), "an unknown row counts as wrong"


def test_dropped_rows_can_stay_for_the_margin():
    batch, module = scored([[1.0, 1, 1, 0]]), Method()
    assert UniOPDBalance(keep_for_margin=True).on_batch_ready(None, module, batch) is None
    assert len(batch) == 4
    assert int((batch.loss_weights != 0).any(1).sum()) == 2
    assert module.logged()["uni_opd/dropped_right"] == 2


# --- runs ------------------------------------------------------------------------------------------------------------


def gradient(policy: Path, **options) -> OPD:
    teacher = told_the_answer(Live())
    return make_module(policy, OPD, **({"teacher": teacher, "loss": "policy_gradient", "group_size": 4} | options))


def test_both_run_and_resume_exactly(tmp_path: Path):
    check_resume(tmp_path, callbacks=lambda: [UniOPDBalance(), MarginCalibration()], module=gradient)


def test_a_margin_that_always_holds_is_plain_distillation(tmp_path: Path):
    policy, metrics = make_policy(tmp_path / "policy"), Metrics()
    states = []
    for name, callbacks in (("plain", []), ("calibrated", [MarginCalibration(margin=-1e9), metrics])):
        module = gradient(policy, max_rollouts=2)
        train(tmp_path / name, module, callbacks)
        states.append(final_state(module))
    assert_same_weights(*states)
    assert metrics.steps[0]["margin/violated_ratio"] == 0.0


def test_it_calibrates_extrapolated_distillation_and_is_refused_where_advantages_do_not_count(tmp_path: Path):
    policy, teacher = make_policy(tmp_path / "policy"), str(make_policy(tmp_path / "teacher", seed=3))
    metrics = Metrics()
    module = make_module(
        policy, GOPD, teacher=Checkpoint(teacher), reference=FrozenCopy(), group_size=4, max_rollouts=1
    )
    train(tmp_path / "gopd", module, [MarginCalibration(margin=5.0), metrics])
    assert metrics.steps[0]["margin/after"] == pytest.approx(5.0, abs=1e-4)
    with pytest.raises(Exception, match="loss='policy_gradient'"):
        train(tmp_path / "gkd", gradient(policy, loss="gkd"), [MarginCalibration()])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MarginCalibration(mode="median"), "mode"),
        (lambda: MarginCalibration(shift="up"), "shift"),
        (lambda: MarginCalibration(retain=2.0), "retain"),
        (lambda: UniOPDBalance(ratio=-1), "ratio"),
        (lambda: UniOPDBalance(scope="group"), "scope"),
    ],
)
def test_impossible_settings_are_refused(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
