# SPDX-License-Identifier: Apache-2.0
"""Schedules, alarms, guards and monitors."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from callback_batches import Module
from npo_runs import Diary, Numbers, guided_module, hopeless_module

from lit_rl.callbacks import Bound, DivergenceGuard, GRPOLambda, RewardAlarm, ScalarSchedule
from lit_rl.callbacks.monitor import Monitor
from lit_rl.methods import SFT
from lit_rl.samplers.base import Sampling
from lit_rl.testing import check_neutral, check_resume, make_module, make_policy, train


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", [1.0, 1.0, 2.5, 4.0, 4.0]),
        ("cosine", [1.0, 1.0, 2.5, 4.0, 4.0]),
        ("exponential", [1.0, 1.0, 2.0, 4.0, 4.0]),
        ("step", [1.0, 1.0, 1.0, 4.0, 4.0]),
    ],
)
def test_a_schedule_is_a_function_of_the_rollout_step(shape: Any, values: list[float]) -> None:
    schedule = ScalarSchedule("kl_coef", 1.0, 4.0, steps=10, begin=5, shape=shape)
    assert [schedule.value(step) for step in (0, 5, 10, 15, 99)] == pytest.approx(values)


def test_a_cosine_starts_and_ends_flat() -> None:
    schedule = ScalarSchedule("kl_coef", 0.0, 1.0, steps=100, shape="cosine")
    assert schedule.value(1) < 0.001
    assert schedule.value(99) > 0.999


def run_with(schedules: list[ScalarSchedule], folder: Path, **options: Any) -> tuple[Any, Numbers]:
    numbers = Numbers()
    module = make_module(make_policy(folder / "policy"), **({"max_rollouts": 4} | options))
    train(folder / "run", module, [*schedules, numbers])
    return module, numbers


def test_several_schedules_move_attributes_rewards_and_other_callbacks(tmp_path: Path) -> None:
    penalty = GRPOLambda(fraction=0)
    schedules = [
        ScalarSchedule("sampling.max_tokens", 2, 5, steps=3),
        ScalarSchedule("rewards.digit.weight", 1.0, 0.25, steps=3),
        ScalarSchedule("callbacks.GRPOLambda.fraction", 0.0, 0.9, steps=3),
        ScalarSchedule("surrogate.clip_high", 0.2, 0.5, steps=3),
    ]
    numbers = Numbers()
    module = make_module(make_policy(tmp_path / "policy"), max_rollouts=4)
    train(tmp_path / "run", module, [*schedules, penalty, numbers])
    assert numbers.series("schedule/sampling.max_tokens") == [2, 3, 4, 5]
    assert [x <= b for x, b in zip(numbers.series("rollout/length_mean"), (2, 3, 4, 5))] == [True] * 4
    assert isinstance(module.sampling.max_tokens, int)
    assert numbers.series("schedule/rewards.digit.weight") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert module.rewards[0].weight == 0.25
    assert numbers.series("schedule/callbacks.GRPOLambda.fraction") == pytest.approx([0.0, 0.3, 0.6, 0.9])
    assert numbers.series("grpo_lambda/selected_fraction") == [0.5, 0.75, 1.0]
    assert module.surrogate.clip_high == 0.5


def test_a_constant_schedule_leaves_the_run_untouched(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [ScalarSchedule("sampling.temperature", 1.0, 1.0, steps=5)])


def test_a_scheduled_run_resumes_exactly(tmp_path: Path) -> None:
    check_resume(tmp_path, lambda: [ScalarSchedule("sampling.temperature", 1.0, 0.5, steps=4)], at=2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("kl_coeff", "has no attribute 'kl_coeff'.*kl_coef"),
        ("sampling.temp", "has no attribute 'temp'.*temperature"),
        ("surrogates.clip_high", "no attribute 'surrogates'"),
        ("rewards.math.weight", "there is no 'math', only"),
        ("callbacks.DOT.alpha", "there is no 'DOT', only"),
        ("seed_text", "not a number"),
    ],
)
def test_a_target_that_is_no_number_is_refused_with_what_there_is(target: str, message: str) -> None:
    module = Module(kl_coef=0.0, sampling=Sampling(), seed_text="x")
    with pytest.raises(ValueError, match=message):
        ScalarSchedule(target, 0.0, 1.0, steps=3).check_setup(module)


def test_schedules_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="same sign"):
        ScalarSchedule("kl_coef", 0.0, 1.0, steps=3, shape="exponential")
    with pytest.raises(ValueError, match="steps"):
        ScalarSchedule("kl_coef", 0.0, 1.0, steps=0)


HEALTHY = {
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "rollout/truncated_ratio": 0.1,
    "rollout/zero_signal_ratio": 0.5,
    "rollout/unscorable_ratio": 0.0,
}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"reward/mean": 0.0, "reward/std": 0.0}, "every completion scored 0"),
        ({"rollout/truncated_ratio": 0.6}, "hit the token budget"),
        ({"rollout/zero_signal_ratio": 0.95}, "most groups have equal rewards"),
        ({"rollout/unscorable_ratio": 0.7}, "rewards fail on most completions"),
        ({"reward/mean": math.nan}, "no completion could be scored"),
        (
            {"reward/mean": math.nan, "rollout/unscorable_ratio": 1.0, "rollout/zero_signal_ratio": 1.0},
            "no completion could be scored",
        ),
        ({"rollout/unscorable_ratio": 0.9, "rollout/zero_signal_ratio": 1.0}, "rewards fail on most completions"),
    ],
)
def test_each_kind_of_bad_step_is_warned_about_once_after_patience(bad: dict[str, float], words: str) -> None:
    alarm, module = RewardAlarm(patience=3), Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for metrics in (HEALTHY | bad, HEALTHY | bad, HEALTHY, *[HEALTHY | bad] * 6):
            alarm.on_metrics(module.trainer, module, metrics)
    assert [words in str(w.message) for w in caught] == [True]
    assert "3 steps in a row" in str(caught[0].message)
    assert module.logged["alarm/bad_steps"] == 6
    assert not module.trainer.should_stop


def test_an_alarm_stops_the_run_if_asked_and_resumes_its_counts(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    module = hopeless_module(policy, rewards=hopeless_module(policy).rewards[1:], max_rollouts=9)
    with pytest.warns(UserWarning, match="every completion scored 0"):
        train(tmp_path / "run", module, [RewardAlarm(patience=2, stop=True)])
    assert module.clock == 2
    alarm = RewardAlarm()
    alarm.counts["truncated"], alarm.rung["zero_reward"] = 3, True
    again = RewardAlarm()
    again.load_state_dict(alarm.state_dict())
    assert (again.counts, again.rung) == (alarm.counts, alarm.rung)


def test_an_alarm_for_a_method_without_rewards_is_refused(tmp_path: Path) -> None:
    module = make_module(make_policy(tmp_path / "policy"), method=SFT, rewards=[])
    with pytest.raises(ValueError, match="SFT has none"):
        train(tmp_path / "run", module, [RewardAlarm()])


def test_a_guard_goes_back_with_a_smaller_learning_rate_and_stops_in_the_end(tmp_path: Path) -> None:
    diary, numbers = Diary(), Numbers()
    guard = DivergenceGuard([Bound("rollout_step", high=2.5)], every=2, max_rewinds=2, backoff=0.5)
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=9)
    with pytest.warns(UserWarning, match=r"rollout_step = 3 is outside \[-inf, 2.5\]"):
        train(tmp_path / "run", module, [guard, diary, numbers])
    assert diary.steps == [0, 1, 2, 3, 2, 3, 2, 3]
    assert diary.rates == pytest.approx([0.01] * 4 + [0.005] * 2 + [0.0025] * 2)
    assert numbers.series("guard/rewinds") == [0, 0, 0, 0, 1, 1, 2, 2]
    assert module.clock == 8


def test_a_guard_that_is_not_triggered_leaves_the_run_untouched(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [DivergenceGuard([Bound("reward/mean", low=-1.0)], every=1)])


def test_a_guarded_run_resumes_exactly_after_it_went_back(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [DivergenceGuard([Bound("rollout_step", high=2.5)], every=2, max_rewinds=1, patience=2)]

    check_resume(tmp_path, callbacks, lambda policy: guided_module(policy, max_rollouts=9), at=5)


def test_the_learning_rate_of_a_schedule_backs_off_too(tmp_path: Path) -> None:
    diary = Diary()
    guard = DivergenceGuard([Bound("rollout_step", high=2.5)], every=1, max_rewinds=1, backoff=0.1)
    module = hopeless_module(make_policy(tmp_path / "policy"), max_rollouts=9)
    train(tmp_path / "run", module, [guard, diary])
    assert diary.steps == [0, 1, 2, 3, 3]
    assert diary.rates[4] == pytest.approx(0.1 * diary.rates[3])


def test_a_guard_may_just_stop(tmp_path: Path) -> None:
    module = guided_module(make_policy(tmp_path / "policy"))
    guard = DivergenceGuard([Bound("rollout_step", high=0.5)], action="stop")
    train(tmp_path / "run", module, [guard])
    assert module.clock == 2
    assert not list((tmp_path / "run").glob("guard/step*"))


def test_a_value_that_is_not_finite_breaks_its_bound_and_a_missing_one_does_not() -> None:
    guard = DivergenceGuard([Bound("policy/kl", high=1.0)], action="stop")
    module = Module()
    for metrics, bad_steps in (({"policy/kl": 0.5}, 0), ({"policy/kl": math.nan}, 1), ({}, 0), ({"policy/kl": 2.0}, 1)):
        guard.on_metrics(None, module, metrics)
        assert guard.bad_steps == bad_steps


def test_guards_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one bound"):
        DivergenceGuard([])
    with pytest.raises(ValueError, match="action"):
        DivergenceGuard([Bound("x")], action="pause")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience"):
        DivergenceGuard([Bound("x")], patience=0)


def test_a_monitor_says_once_that_its_value_never_appears() -> None:
    monitor = Monitor("reward/mth", "Somebody", patience=2)
    with pytest.warns(UserWarning, match="Somebody watches 'reward/mth'.*Logged are: reward/math"):
        values = [monitor.read({"reward/math": 1.0}) for _ in range(3)]
    assert all(math.isnan(v) for v in values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = Monitor("x", "Somebody", patience=2)
        assert seen.read(SimpleNamespace(x=1).__dict__) == 1
        assert all(math.isnan(seen.read({})) for _ in range(5))


def test_a_number_logged_now_and_then_is_gone_at_the_next_step(tmp_path: Path) -> None:
    class Sometimes(RewardAlarm):
        def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
            if module.clock == 1:
                module.log("one", 1.0)
                module.log_dict({"two": 2.0})

    numbers = Numbers()
    train(tmp_path / "run", guided_module(make_policy(tmp_path / "policy"), max_rollouts=4), [Sometimes(), numbers])
    assert [clock for clock, logged in numbers.logged.items() if "one" in logged] == [1]
    assert [clock for clock, logged in numbers.logged.items() if "two" in logged] == [1]
