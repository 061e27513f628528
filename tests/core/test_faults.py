# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong in a run is announced in plain words, counted, and never taken for a score of 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_rl.hooks import RolloutCallback
from lit_rl.methods import GRPO, RLModule
from lit_rl.methods.updating import NonFiniteGradientError
from lit_rl.objectives import AdvantageNormalizer
from lit_rl.policies import Policy
from lit_rl.prompts import PromptEncoder
from lit_rl.rewards import FunctionReward, RewardSetupError
from lit_rl.storage import load_rollouts
from lit_rl.testing import final_state, make_module, make_policy, toy_reward, train
from tests.core.test_step import Watch, moved
from tests.rewards.misbehaving import verify


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def run(folder: Path, policy: Path, *callbacks: Callback, **options: Any) -> tuple[RLModule, Watch]:
    module, watch = make_module(policy, **({"max_rollouts": 2} | options)), Watch()
    train(folder, module, [*callbacks, watch])
    return module, watch


class Poison(RolloutCallback):
    """Makes the loss of one step infinite, or not a number."""

    def __init__(self, value: float, clock: int = 1) -> None:
        self.value, self.clock = value, clock

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        if module.clock == self.clock:
            rollouts.advantages[3, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_its_batch_is_on_disk(policy, tmp_path, value):
    with pytest.raises(
        NonFiniteGradientError, match=r"The gradient norm of training step 1 is .* saved to (.*)\. Look"
    ):
        run(tmp_path, policy, Poison(value))
    saved = load_rollouts(tmp_path / "nonfinite", "clock00000001-rank0")
    assert str(float(saved.advantages[3, 0])) == str(value)
    assert len(saved) == 16


def test_a_loss_that_is_not_finite_can_be_skipped_and_is_counted(policy, tmp_path):
    module, watch = run(tmp_path, policy, Poison(math.nan), max_rollouts=3, on_nonfinite="skip")
    assert [m.get("policy/skipped_updates", 0) for m in watch.metrics] == [0, 1, 1]
    before, during = watch.weights[0], watch.weights[1]
    assert all(torch.equal(before[name], during[name]) for name in before)
    assert all(torch.isfinite(p).all() for p in module.model.parameters())
    assert not all(torch.equal(during[name], watch.weights[2][name]) for name in before)
    assert (tmp_path / "nonfinite" / "clock00000001-rank0.jsonl").exists()


def test_rewards_that_are_all_zero_train_nothing_and_show_as_groups_without_signal(policy, tmp_path):
    module, watch = run(tmp_path, policy, rewards=[FunctionReward(lambda b: [0.0] * len(b), name="zero")])
    assert [m["rollout/zero_signal_ratio"] for m in watch.metrics] == [1, 1]
    assert [m["reward/mean"] for m in watch.metrics] == [0, 0]
    assert not moved(module, policy)


def test_rewards_that_are_not_a_number_are_left_out_and_the_other_rows_train(policy, tmp_path):
    def every_other(batch: Any) -> list[float]:
        return [math.nan if i % 2 else float(i % 4 == 0) for i in range(len(batch))]

    module, watch = run(tmp_path, policy, rewards=[FunctionReward(every_other, name="half", verifier=True)])
    assert [m["rollout/unscorable_ratio"] for m in watch.metrics] == [0.5, 0.5]
    assert [m["reward/mean"] for m in watch.metrics] == [0.5, 0.5]
    advantages = module.last_rollouts.advantages
    assert not advantages[1::2].any()
    assert advantages[0::2, 0].ne(0).all()
    assert moved(module, policy)


def test_a_run_in_which_nothing_can_be_scored_goes_on_and_says_so(policy, tmp_path):
    module, watch = run(tmp_path, policy, rewards=[FunctionReward(lambda b: [None] * len(b), name="none")])
    assert [m["rollout/unscorable_ratio"] for m in watch.metrics] == [1, 1]
    assert all("reward/mean" not in m for m in watch.metrics)
    assert not moved(module, policy)


def test_a_reward_of_the_wrong_shape_stops_the_run_by_name(policy, tmp_path):
    with pytest.raises(ValueError, match=r"Reward 'short' must return one value .* shape \(16,\), received \(2,\)"):
        run(tmp_path, policy, rewards=[FunctionReward(lambda b: [1.0, 2.0], name="short")])


class Speak(RolloutCallback):
    """Replaces what a verifier reads: completions become words it fails on, each in its own way."""

    words = ["42", "hang", "raise", "segfault"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        original = pl_module.reward_input

        def speak(rollouts: Any) -> Any:
            batch = original(rollouts)
            batch.completions = [self.words[i % 4] for i in range(len(batch))]
            return batch

        pl_module.reward_input = speak


def test_a_verifier_that_hangs_raises_or_crashes_costs_its_rows_and_nothing_else(policy, tmp_path):
    reward = FunctionReward(verify, name="verify", verifier=True, per_row=True, timeout=1.0, workers=2)
    with pytest.warns(RuntimeWarning, match="could not score"):
        module, watch = run(tmp_path, policy, Speak(), rewards=[reward], prompts_per_step=2, max_rollouts=1)
    logged = watch.metrics[0]
    assert [logged[f"reward/verify_{kind}"] for kind in ("timeout", "error", "crash")] == [2, 2, 2]
    assert logged["rollout/unscorable_ratio"] == 0.75
    assert logged["reward/mean"] == 1.0
    assert module.last_rollouts.correct[[0, 4]].tolist() == [1.0, 1.0]
    assert module.last_rollouts.correct[[1, 2, 3]].isnan().all()


@pytest.mark.filterwarnings("ignore:Reward 'broken' could not score")
def test_a_reward_that_fails_on_all_of_its_first_step_stops_the_run(policy, tmp_path):
    def misspelt(batch: Any) -> list[float]:
        return [float(len(c)) for c in batch.completion]

    broken = FunctionReward(misspelt, name="broken", weight=0.0)  # even one that is only watched
    with pytest.raises(RewardSetupError, match=r"'broken' failed on every .* first step \(error: .*'completion'"):
        run(tmp_path, policy, rewards=[toy_reward(), broken])


def test_a_reward_that_fails_later_or_has_no_opinion_does_not(policy, tmp_path):
    calls: list[int] = []

    def breaks(batch: Any) -> list[float]:
        calls.append(len(batch))
        if len(calls) > 1:
            raise RuntimeError("later")
        return [1.0] * len(batch)

    rewards = [
        toy_reward(),
        FunctionReward(breaks, name="late"),
        FunctionReward(lambda batch: [None] * len(batch), name="silent", weight=0.0),
    ]
    with pytest.warns(RuntimeWarning, match="could not score"):
        module, watch = run(tmp_path, policy, rewards=rewards, max_rollouts=3)
    assert [m.get("reward/late_error") for m in watch.metrics] == [None, 16, 16]
    assert module.clock == 3


class SeesImages(PromptEncoder):
    def encode(self, records: Any, draws: Any) -> Any:
        prompts = super().encode(records, draws)
        prompts.model_inputs["pixel_values"] = [None] * len(prompts)
        return prompts


def test_inputs_that_training_would_ignore_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match=r"SeesImages adds further inputs of the model \(pixel_values\)"):
        run(tmp_path, policy, encoder=SeesImages)


def test_failures_in_a_validation_are_not_those_of_training(policy, tmp_path):
    def fails_in_validation(batch: Any) -> list[float]:
        if len(batch) == 8:
            raise RuntimeError("no")
        return [1.0] * len(batch)

    module, watch = (
        make_module(policy, rewards=[FunctionReward(fails_in_validation, name="r")], max_rollouts=2),
        Watch(),
    )
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    with pytest.warns(RuntimeWarning, match="could not score"):
        train(tmp_path, module, [watch], **settings)
    assert not any("reward/r_error" in m for m in watch.metrics)
    assert module.evaluation["val/r_error"] == 8


def no_baseline() -> AdvantageNormalizer:
    return AdvantageNormalizer(center="batch", scale="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size=1 leaves nothing to compare with"),
        ({"kl_coef": 0.1}, "kl_coef is set but there is no reference policy"),
        ({"rewards": []}, "learns from rewards: give at least one"),
        ({"rewards": [toy_reward(), toy_reward()]}, "digit"),
        ({"prompts_per_step": 0}, "prompts_per_step must be at least 1"),
        ({"max_rounds": 0}, "max_rounds must be at least 1"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens must be at least 1"),
        ({"updates_per_rollout": 5}, "updates_per_rollout=5 needs at least as many prompts"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of"),
        ({"old_logprobs": "guess"}, "old_logprobs must be one of"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        GRPO(
            **(
                {"policy": Policy("nowhere"), "rewards": [toy_reward()], "group_size": 4, "prompts_per_step": 4}
                | options
            )
        )


def test_a_single_completion_a_prompt_works_with_a_baseline_over_the_batch(policy, tmp_path):
    module, _ = run(tmp_path, policy, group_size=1, prompts_per_step=16, advantage=no_baseline())
    assert moved(module, policy)


def test_batches_that_do_not_divide_are_refused_before_the_model_is_loaded(policy, tmp_path):
    module = make_module(policy, prompts_per_step=5, updates_per_rollout=2)
    with pytest.raises(ValueError, match="draws 5 prompts, which does not divide into updates_per_rollout=2"):
        train(tmp_path, module)
    assert module.model is None


def test_a_column_that_a_reward_reads_and_the_data_lacks_is_refused_before_the_model_is_loaded(policy, tmp_path):
    module = make_module(policy, rewards=[FunctionReward(verify, name="r", per_row=True, columns=["solution"])])
    with pytest.raises(ValueError, match=r"Reward 'r' reads the column 'solution', but the data has only \['answer'\]"):
        train(tmp_path, module)
    assert module.model is None


def test_a_foreign_datamodule_is_refused_with_a_hint(policy, tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringDataModule

    with pytest.raises(TypeError, match="draw their prompts from a PromptDataModule"):
        train(tmp_path, make_module(policy), data=BoringDataModule())


def test_a_run_whose_steps_are_all_done_ends_at_once(policy, tmp_path):
    module, _ = run(tmp_path, policy, max_rollouts=2)
    rest = make_module(policy, max_rollouts=2)
    train(tmp_path, rest, checkpoint=tmp_path / "checkpoints" / "clock00000002.ckpt")
    assert rest.clock == 2
    assert all(torch.equal(a, b) for a, b in zip(final_state(module).values(), final_state(rest).values()))
