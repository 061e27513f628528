# SPDX-License-Identifier: Apache-2.0
"""The public test kit passes what keeps its promises and catches what does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.distributed import all_sum
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import GRPO
from lit_rl.testing import (
    check_neutral,
    check_resume,
    check_split_invariance,
    check_two_ranks,
    make_module,
    make_policy,
    train,
)


class Scale(RolloutCallback):
    """Weighs rewards by how many it has seen."""

    remembers = True

    def __init__(self, strength: float = 1.0) -> None:
        self.strength, self.seen = strength, 0

    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> None:
        weight = 1 + self.strength * (self.seen % 4)
        rollouts.reward_weights["digit"] = torch.full((len(rollouts),), weight)
        self.seen += 1

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        rollouts.advantages = rollouts.advantages * rollouts.reward_weights["digit"][:, None]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen} if self.remembers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict.get("seen", self.seen)


class Forgetful(Scale):
    remembers = False


class ForgetsTensors(Scale):
    """Its state looks complete, but holds a view of what it goes on changing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(1)

    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> None:
        super().on_rewards(trainer, module, rollouts)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "count": self.count.clone()}  # and load_state_dict leaves `count` alone


class Mutter(RolloutCallback):
    """Changes a bit of a bit."""

    def on_loss_weights(self, trainer: Any, module: Any, rollouts: Any) -> None:
        rollouts.loss_weights[0] *= 1 + 1e-6


class BatchMean(RolloutCallback):
    """Centres advantages over the batch: over all ranks, or (wrongly) over its own."""

    def __init__(self, reduce: bool) -> None:
        self.reduce = all_sum if reduce else (lambda x: x)

    def on_advantages(self, trainer: Any, module: Any, rollouts: Any) -> None:
        kept = rollouts.kept_mask()
        sums = torch.stack([rollouts.rewards.double().sum(), torch.tensor(float(len(rollouts)), dtype=torch.double)])
        total, count = self.reduce(sums)
        rollouts.advantages = torch.where(kept, (rollouts.rewards - total / count)[:, None], 0.0)


def global_mean() -> list[RolloutCallback]:
    return [BatchMean(True)]


def rank_local_mean() -> list[RolloutCallback]:
    return [BatchMean(False)]


def test_a_neutral_callback_passes_and_one_that_changes_a_weight_slightly_does_not(tmp_path: Path):
    check_neutral(tmp_path / "ok", lambda: [Scale(0.0)])
    with pytest.raises(AssertionError, match="differs by up to"):
        check_neutral(tmp_path / "not", lambda: [Mutter()])


def test_a_callback_that_forgets_is_caught_by_its_effect(tmp_path: Path):
    check_resume(tmp_path / "ok", lambda: [Scale()])
    with pytest.raises(AssertionError, match="differs by up to"):
        check_resume(tmp_path / "not", lambda: [Forgetful()])


def test_a_callback_that_does_not_load_what_it_saves_is_caught_by_its_state(tmp_path: Path):
    with pytest.raises(AssertionError, match=re.escape("ForgetsTensors, stopped between two steps, count is tensor")):
        check_resume(tmp_path, lambda: [ForgetsTensors()])


@pytest.mark.parametrize("callback", [Forgetful, ForgetsTensors])
def test_a_resume_that_differs_says_where_state_belongs(tmp_path: Path, callback: type[Scale]):
    with pytest.raises(AssertionError, match="must return from `state_dict` and restore in `load_state_dict`"):
        check_resume(tmp_path, lambda: [callback()])


def test_a_statistic_that_is_not_reduced_over_ranks_is_caught(tmp_path: Path):
    check_two_ranks(tmp_path / "ok", global_mean)
    with pytest.raises(AssertionError, match="between one rank and rank"):
        check_two_ranks(tmp_path / "not", rank_local_mean)


class MicroBatchMean(GRPO):
    """Averages over each micro-batch instead of over the whole optimizer step."""

    def losses(self, micro: Any, current: Any, denominators: Any) -> Any:
        own = tuple(term.averaging(micro)[1] for term in self.loss_terms)
        return super().losses(micro, current, own)


@pytest.mark.parametrize("method", [GRPO, MicroBatchMean])
def test_a_loss_that_depends_on_the_split_is_caught(tmp_path: Path, method: type[GRPO]):
    module = make_module(make_policy(tmp_path / "policy"), method=method, max_rollouts=1, prompts_per_step=8)
    train(tmp_path, module)
    module.model.double()
    batch = module.last_rollouts
    assert (batch.advantages != 0).any()
    if method is GRPO:
        check_split_invariance(module, batch)
    else:
        with pytest.raises(AssertionError, match="moves by"):
            check_split_invariance(module, batch)
