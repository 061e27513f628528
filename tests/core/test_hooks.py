# SPDX-License-Identifier: Apache-2.0
"""Hooks run in the order of the list, between the right stages, and leave a record of what they changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_rl.hooks import HOOKS, RolloutCallback, callbacks_with, warn_of_misspelt_hooks
from lit_rl.methods import RLModule
from lit_rl.policies import FrozenCopy
from lit_rl.rollouts import Edit
from lit_rl.samplers import Sampling
from lit_rl.samplers.dataset import DatasetSampler
from lit_rl.testing import make_module, make_policy, train


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def run(folder: Path, policy: Path, *callbacks: Callback, **options: Any) -> RLModule:
    module = make_module(policy, **({"max_rollouts": 1} | options))
    train(folder, module, callbacks)
    return module


class Trace(RolloutCallback):
    """Notes every hook that is called, in a list that several may share."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls


def _note(hook: str) -> Any:
    return lambda self, *args: self.calls.append(f"{self.name} {hook}")


for _hook in HOOKS:
    setattr(Trace, _hook, _note(_hook))


def test_hooks_run_stage_by_stage_and_within_a_stage_in_the_order_of_the_list(policy, tmp_path):
    calls: list[str] = []
    run(tmp_path, policy, Trace("a", calls), Trace("b", calls), updates_per_rollout=2)
    stages = [
        "on_step_boundary",
        "on_plan",
        "on_rollout_request",
        "on_rollouts",
        "on_rewards",
        "on_collected",
        "on_batch_ready",
    ]
    update = ["on_loss_weights", "on_micro_batch", "on_loss_terms"]
    expected = [*stages, "on_advantages", *update, *update, "on_metrics"]
    assert calls == [f"{name} {hook}" for hook in expected for name in "ab"]


def test_any_lightning_callback_may_have_hooks_and_inherited_empty_ones_do_not_count(policy, tmp_path):
    class Plain(Callback):
        def on_rollouts(self, trainer: Any, module: Any, rollouts: Any) -> None:
            self.seen = len(rollouts)

    plain, idle = Plain(), RolloutCallback()
    module = run(tmp_path, policy, plain, idle)
    assert plain.seen == 16
    assert callbacks_with(module.trainer, "on_rollouts") == [plain]
    assert callbacks_with(module.trainer, "on_rewards") == []


class Misspelt(RolloutCallback):
    def on_rolouts(self, trainer: Any, module: Any, rollouts: Any) -> None:
        raise AssertionError("nobody calls it")


def test_a_misspelt_hook_is_warned_about(policy, tmp_path):
    with pytest.warns(UserWarning, match=r"Misspelt\.on_rolouts is no hook: .* Did you mean on_rollouts\?"):
        run(tmp_path, policy, Misspelt())


def test_no_callback_of_the_package_has_a_misspelt_hook():
    import lit_rl.callbacks as ours

    kinds = [v for v in (getattr(ours, name) for name in ours.__all__) if isinstance(v, type)]
    rollout_callbacks = [kind for kind in kinds if issubclass(kind, RolloutCallback)]
    assert len(rollout_callbacks) > 10
    for kind in rollout_callbacks:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_misspelt_hooks(kind.__new__(kind))


class EditInPlace(RolloutCallback):
    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> None:
        rollouts.loss_weights[0, :2] = 0.5

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Any) -> None:
        rollouts.loss_weights[0, 0] = 0.25


class DropHalf(RolloutCallback):
    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> Any:
        return rollouts.select_groups(torch.tensor([True, True, False, False]))


class Hotter(RolloutCallback):
    def on_rollout_request(self, trainer: Any, module: Any, request: Any) -> None:
        request.sampling.temperature = 2.0
        request.budgets = torch.full((len(request),), 3)


class Looks(RolloutCallback):
    def on_rollouts(self, trainer: Any, module: Any, rollouts: Any) -> Any:
        return rollouts

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        rollouts.advantages.sum()


def test_what_callbacks_change_is_recorded_whether_in_place_or_returned(policy, tmp_path):
    module = run(tmp_path, policy, Looks(), EditInPlace(), DropHalf(), Hotter())
    assert module.last_rollouts.edits == [
        Edit("on_rollout_request", "Hotter", "budgets", 16),
        Edit("on_rollout_request", "Hotter", "sampling.temperature", 1),
        Edit("on_rewards", "EditInPlace", "loss_weights", 2),
        Edit("on_rewards", "DropHalf", "rows", 8),
        Edit("on_loss_weights", "EditInPlace", "loss_weights", 1),
    ]
    assert module.last_rollouts.generated.max() == 3
    assert module.sampling == Sampling(max_tokens=6)  # a request's settings are its own


def test_edits_of_mini_batches_are_recorded_in_the_batch_and_every_pass_begins_with_the_same_weights(policy, tmp_path):
    class Halve(RolloutCallback):
        seen: list[float] = []

        def on_loss_weights(self, trainer: Any, module: Any, rollouts: Any) -> None:
            self.seen.append(float(rollouts.loss_weights.max()))
            rollouts.loss_weights *= 0.5

    module = run(tmp_path, policy, Halve(), epochs_per_rollout=3)
    assert Halve.seen == [1.0, 1.0, 1.0]
    tokens = int(module.last_rollouts.completion_mask.sum())
    assert module.last_rollouts.edits == [Edit("on_loss_weights", "Halve", "loss_weights", tokens)] * 3


def test_plans_and_demands_decide_how_many_prompts_are_drawn(policy, tmp_path):
    class Plan(RolloutCallback):
        def on_plan(self, trainer: Any, module: Any, prompts: int) -> int:
            assert prompts == 4
            return 3

        def on_collected(self, trainer: Any, module: Any, rollouts: Any) -> int | None:
            return 2 if len(rollouts.prompts) < 6 else None

    module = run(tmp_path, policy, Plan())
    assert module.last_rollouts.prompts.draw.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert module.cursor == 7


def test_demands_end_with_the_last_round(policy, tmp_path):
    class Insatiable(RolloutCallback):
        def on_collected(self, trainer: Any, module: Any, rollouts: Any) -> int:
            return 1

    module = run(tmp_path, policy, Insatiable(), max_rounds=3)
    assert len(module.last_rollouts.prompts) == 4 + 1 + 1


class Needs(RolloutCallback):
    def __init__(self, *signals: str) -> None:
        self.requires = frozenset(signals)

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        self.seen = rollouts.clone()


@pytest.mark.parametrize(
    ("signal", "options", "message"),
    [
        ("logprobs.reference", {}, "Needs requires 'logprobs.reference', which nothing provides: set `reference`"),
        ("correct", {"rewards": "unverified"}, "mark one reward as the verifier"),
        ("values", {}, r"register a provider in module.providers\['values'\]"),
        ("logprobs.sampler", {"sampler": DatasetSampler()}, "which nothing provides"),
        (
            "logprob.reference",
            {},
            r"provider in module.providers\['logprob.reference'\]. Did you mean logprobs.reference\?",
        ),
        (
            "rewrds",
            {},
            r"Did you mean rewards\? There are: correct, entropy, lengths, logprobs.old, logprobs.sampler, ",
        ),
    ],
)
def test_a_requirement_that_nothing_provides_is_refused_before_the_model_is_loaded(
    policy, tmp_path, signal, options, message
):
    from lit_rl.testing import toy_reward

    if options.get("rewards") == "unverified":
        reward = toy_reward()
        reward.verifier = False
        options = {"rewards": [reward]}
    module = make_module(policy, **options)
    if signal == "logprobs.sampler":
        module.sampler.provides = frozenset()
    with pytest.raises(ValueError, match=message):
        train(tmp_path, module, [Needs(signal)])
    assert module.model is None


def test_requirements_are_provided_once_before_credit(policy, tmp_path):
    needs = Needs("logprobs.reference", "logprobs.old", "entropy", "values", "correct", "reward_terms.digit")
    calls = []

    def values(module: RLModule, rollouts: Any) -> None:
        calls.append(len(rollouts))
        rollouts.row["values"] = torch.arange(len(rollouts)).float()

    module = make_module(policy, max_rollouts=1, reference=FrozenCopy(), keep_entropy=False)
    module.providers["values"] = values
    train(tmp_path, module, [needs])
    seen = needs.seen
    assert calls == [16]
    assert seen.row["values"].tolist() == list(range(16))
    mask = seen.completion_mask
    assert torch.equal(seen.logprobs["old"], seen.logprobs["sampler"])  # same weights, same kernels, full support
    assert torch.allclose(seen.logprobs["reference"], seen.logprobs["sampler"], atol=1e-5)
    assert bool((seen.token["entropy"][mask] > 0).all())
    assert not seen.token["entropy"][~mask].any()


def test_setup_checks_of_callbacks_see_the_method(policy, tmp_path):
    class Picky(RolloutCallback):
        def check_setup(self, module: RLModule) -> None:
            if module.group_size < 8:
                raise ValueError(f"Picky needs groups of 8, but group_size is {module.group_size}.")

    with pytest.raises(ValueError, match="group_size is 4"):
        run(tmp_path, policy, Picky())


def test_rows_that_a_callback_rescores_get_new_verdicts_and_the_others_keep_theirs(policy, tmp_path):
    class CutFirst(RolloutCallback):
        def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> None:
            rollouts.reward_terms["digit"] = torch.full((16,), 7.0)
            rollouts.truncate(torch.tensor([0, 5]), torch.tensor([0, 0]))
            module.rescore(rollouts, torch.tensor([0, 5]))

    module = run(tmp_path, policy, CutFirst())
    terms = module.last_rollouts.reward_terms["digit"].tolist()
    assert terms[0] == terms[5] == 0.0
    assert set(terms[1:5] + terms[6:]) == {7.0}
    assert module.last_rollouts.correct[[0, 5]].tolist() == [0.0, 0.0]
