# SPDX-License-Identifier: Apache-2.0
"""Interventions side by side: which orders are accepted, which are refused and why, and what order changes nothing."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from callback_batches import Module
from npo_runs import guided_module

from lit_rl.callbacks import (
    RECAP,
    AutoNPO,
    Bound,
    DivergenceGuard,
    DynamicOutlierTruncation,
    DynamicSampling,
    EntropyMonitor,
    GRPOLambda,
    NPOSchedule,
    Objective,
    PredictiveDynamicSampling,
    RewardAlarm,
    ScalarSchedule,
)
from lit_rl.testing import assert_same_weights, final_state, make_policy, train

BUILD: dict[str, Any] = {
    "autonpo": lambda: AutoNPO(distances=(1, 2), window=1, reward_gain=9.0, entropy_drop=-9.0, probe_pass_rate=0.01),
    "npo": lambda: NPOSchedule(0, 2),
    "dot": lambda: DynamicOutlierTruncation(alpha=0.5, min_margin=1, min_success=0.5),
    "lambda": lambda: GRPOLambda(fraction=0.5),
    "recap": lambda: RECAP([Objective("answer", "reward/answer", "reward", "loss:policy")], window=1),
    "pds": PredictiveDynamicSampling,
    "dynamic": DynamicSampling,
    "guard": lambda: DivergenceGuard([Bound("policy/entropy", low=0.0)], every=2),
    "alarm": RewardAlarm,
    "schedule": lambda: ScalarSchedule("sampling.temperature", 1.0, 0.9, steps=3),
    "entropy": EntropyMonitor,
}


def accepted(names: tuple[str, ...]) -> bool:
    """Whether setup should accept these callbacks in this order."""
    if {"pds", "dynamic"} <= set(names):
        return False
    if "dynamic" in names:
        behind = names[names.index("dynamic") + 1 :]
        return not {"dot", "npo", "autonpo"} & set(behind)
    return True


@pytest.mark.parametrize("names", list(permutations(["autonpo", "dot", "lambda", "recap"])), ids="-".join)
def test_the_four_are_accepted_in_every_order(names: tuple[str, ...]) -> None:
    module = Module()
    module.loss_terms = [type("Term", (), {"name": "policy"})()]
    module.rewards[0].name = "answer"
    callbacks = [BUILD[name]() for name in names]
    module.trainer.callbacks = callbacks
    for callback in callbacks:
        callback.check_setup(module)


@pytest.mark.parametrize("seed", range(8))
def test_any_subset_runs_in_any_order_or_is_refused_with_a_sentence(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    names = tuple(rng.sample(sorted(BUILD), rng.randint(2, len(BUILD))))
    module = guided_module(make_policy(tmp_path / "policy"), max_rollouts=3)
    callbacks = [BUILD[name]() for name in names]
    if accepted(names):
        train(tmp_path / "run", module, callbacks)
        assert module.rollout_step == 3
    else:
        with pytest.raises(ValueError, match=r"use one of them|list \w+ before DynamicSampling"):
            train(tmp_path / "run", module, callbacks)


def test_order_does_not_matter_where_callbacks_act_in_different_stages(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    results = []
    for names in (
        ("dot", "lambda", "recap", "pds", "guard"),
        ("guard", "recap", "lambda", "pds", "dot"),
        ("lambda", "guard", "dot", "pds", "recap"),
    ):
        module = guided_module(policy, max_rollouts=4)
        train(tmp_path / "-".join(names), module, [BUILD[name]() for name in names])
        results.append(final_state(module))
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])
