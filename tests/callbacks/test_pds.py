# SPDX-License-Identifier: Apache-2.0
"""Predictive dynamic sampling: the prediction, the selection, and that leaving groups out equals padding them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_batches import NAN, Module, add_demonstrations, batch

from lit_rl.callbacks import DynamicSampling, PredictiveDynamicSampling
from lit_rl.callbacks.signal import carries_signal
from lit_rl.hooks import RolloutCallback
from lit_rl.rollouts import Rollouts
from lit_rl.testing import check_neutral, check_resume, loss_and_gradients, make_module, make_policy, train


def predicted(rates: list[float]) -> PredictiveDynamicSampling:
    """The callback after steps with these pass rates."""
    callback = PredictiveDynamicSampling()
    callback.rates.extend(rates)
    return callback


@pytest.mark.parametrize(
    ("rates", "factor"),
    [([], 1.5), ([0.5] * 3, 2.0), ([0.4, 0.6], 2.2), ([0.25, 0.75], 2.5), ([1.0], 1.2), ([0.1] * 5, 5.0), ([0.0], 5.0)],
)
def test_the_factor_follows_the_pass_rates(rates: list[float], factor: float) -> None:
    assert predicted(rates).factor() == pytest.approx(factor)


def test_the_number_of_prompts_is_rounded_down() -> None:
    assert predicted([0.25, 0.75]).on_plan(None, Module(prompts_per_step=128), 128) == 320
    assert predicted([0.4, 0.6]).on_plan(None, Module(prompts_per_step=7), 7) == 15
    assert (
        predicted([0.4, 0.6]).on_plan(None, Module(prompts_per_step=10), 10) == 22
    )  # not 21: 2.2 is 2.1999… in binary


def test_only_the_last_steps_count() -> None:
    callback = PredictiveDynamicSampling(history=2)
    callback.rates.extend([0.1, 0.1, 0.4, 0.6])
    assert callback.factor() == pytest.approx(2.2)


MIXED = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [NAN, 1.0], [0.0, 1.0]]


def test_the_first_groups_with_signal_are_kept_in_drawing_order() -> None:
    callback, module = predicted([0.5]), Module(prompts_per_step=3)
    kept = callback.on_batch_ready(None, module, batch([[5, 6]] * 8, MIXED))
    assert kept.prompts.draw.tolist() == [0, 2, 4]
    assert kept.correct.tolist() == [1, 0, 0, 1, 0, 1]
    assert list(callback.rates) == [0.5, 5 / 8]
    logged = module.numbers()
    assert logged == {
        "pds/factor": pytest.approx(2.0),
        "pds/pass_rate": pytest.approx(5 / 8),
        "pds/wasted": pytest.approx(2 / 8),
    }


def test_too_few_groups_are_kept_all_and_none_is_wasted() -> None:
    callback, module = PredictiveDynamicSampling(), Module(prompts_per_step=20)
    kept = callback.on_batch_ready(None, module, batch([[5, 6]] * 8, MIXED))
    assert kept.prompts.draw.tolist() == [0, 2, 4, 5, 7]
    assert module.numbers()["pds/wasted"] == 0


def test_a_batch_without_any_signal_is_empty_and_makes_the_next_one_large() -> None:
    callback = PredictiveDynamicSampling()
    kept = callback.on_batch_ready(None, Module(), batch([[5, 6]] * 2, [[1.0, 1.0], [0.0, 0.0]]))
    assert len(kept) == 0
    assert callback.factor() == 5.0


def test_groups_of_demonstrations_always_carry_signal() -> None:
    for verdict in (NAN, 1.0):
        mixed = add_demonstrations(batch([[5, 6]] * 8, MIXED), [7, 9], verdict)
        assert carries_signal(mixed).tolist() == [True, False, True, False, True, True, False, True, True, True]
    kept = DynamicSampling().on_rewards(None, Module(), mixed)
    assert kept.prompts.draw.tolist() == [0, 2, 4, 5, 7, 8, 9]


def test_signal_is_what_a_loop_over_groups_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (30, 3), generator=generator).float()
    rewards[torch.rand(30, 3, generator=generator) < 0.3] = NAN
    expected = [len({float(r) for r in group if r == r}) > 1 for group in rewards]
    assert carries_signal(batch([[4, 5, 6]] * 30, rewards.tolist())).tolist() == expected


def test_two_callbacks_that_choose_the_number_of_prompts_are_refused() -> None:
    callback = PredictiveDynamicSampling()
    with pytest.raises(ValueError, match="use one of them"):
        callback.check_setup(Module([DynamicSampling(), callback]))
    callback.check_setup(Module([DynamicSampling(enabled=False), callback]))


@pytest.mark.parametrize("options", [{"history": 0}, {"first": 0.5}, {"smallest": 0.9}, {"largest": 1.1}])
def test_arguments_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PredictiveDynamicSampling(**options)


class KeepBatch(RolloutCallback):
    """Remembers the batch that is trained on."""

    def on_advantages(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        self.batch = rollouts.clone()


def test_leaving_groups_out_gives_the_loss_of_padding_them_with_zero_weights(tmp_path: Path) -> None:
    keeper = KeepBatch()
    module = make_module(make_policy(tmp_path / "policy"), max_rollouts=1)
    train(tmp_path, module, [keeper])
    module.model.double()
    whole = keeper.batch.clone()
    idle = (whole.advantages == 0).all(1)
    groups = whole.group_mean(idle.double()) == 1  # [B], without signal
    assert 0 < int(groups.sum()) < len(groups)
    padded = whole.clone()
    padded.loss_weights = torch.where(groups[whole.group][:, None], 0.0, whole.loss_weights)
    loss, gradients = loss_and_gradients(module, whole.select_groups(~groups), 10**6)
    other, others = loss_and_gradients(module, padded, 10**6)
    assert loss == pytest.approx(other, abs=1e-12)
    assert max(float((gradients[n] - others[n]).abs().max()) for n in gradients) < 1e-12
    _, counted = loss_and_gradients(module, whole, 10**6)  # groups without signal count in the mean when they are kept
    assert max(float((gradients[n] - counted[n]).abs().max()) for n in gradients) > 1e-6


def test_switched_off_it_leaves_the_run_untouched(tmp_path: Path) -> None:
    check_neutral(tmp_path, lambda: [PredictiveDynamicSampling(enabled=False)])
    check_neutral(tmp_path / "dynamic", lambda: [DynamicSampling(enabled=False)])


def test_a_run_resumes_exactly_in_the_middle_of_its_history(tmp_path: Path) -> None:
    callbacks: list[PredictiveDynamicSampling] = []

    def build() -> list[PredictiveDynamicSampling]:
        callbacks.append(PredictiveDynamicSampling(history=3))
        return callbacks[-1:]

    check_resume(tmp_path, build, at=2)
    assert len(callbacks[0].rates) == 3  # of the run that was not stopped
    assert len(set(callbacks[0].rates)) > 1


def test_dynamic_sampling_refills_the_batch_and_resumes_exactly(tmp_path: Path) -> None:
    sizes = []

    class Sizes(RolloutCallback):
        def on_batch_ready(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
            sizes.append(len(rollouts.prompts))
            assert carries_signal(rollouts).all()

    check_resume(
        tmp_path,
        lambda: [DynamicSampling(), Sizes()],
        lambda policy: make_module(policy, max_rounds=30, max_rollouts=4),
        at=2,
    )
    assert set(sizes) == {4}
