# SPDX-License-Identifier: Apache-2.0
"""One lesson for every sampler: the same few steps on the toy task, and what held-out accuracy they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_rl.methods import RLModule
from lit_rl.samplers import RolloutSampler
from lit_rl.testing import ToyData, make_module, make_policy, make_trainer, train

STEPS = 60
NOISE = 0.1  # three standard deviations of a pass@1 of 0.9 on 256 problems are 0.06, and runs differ


def held_out() -> ToyData:
    """Endless training problems and 256 others."""
    return ToyData(evaluation=256)


def learner(policy: Path, **options: Any) -> RLModule:
    """A module that learns the toy task in `STEPS` steps."""
    return make_module(policy, **({"max_rollouts": STEPS, "prompts_per_step": 8, "group_size": 8} | options))


def pass_at_1(module: RLModule, folder: Path) -> float:
    """Held-out accuracy."""
    trainer = make_trainer(folder, limit_val_batches=1.0)
    return trainer.validate(module, datamodule=held_out(), verbose=False)[0]["val/pass@1"]


def check_that_it_teaches(sampler: RolloutSampler, folder: Path, **shape: Any) -> None:
    """Held-out accuracy rises by half, and ends where the built-in sampler's does, within noise.

    Args:
        sampler: under test.
        folder: for the runs.
        shape: arguments of `make_policy`.
    """
    policy = make_policy(folder / "policy", **shape)
    before = pass_at_1(learner(policy), folder / "before")
    after = {}
    for name, options in (("built-in", {}), ("tested", {"sampler": sampler})):
        module = learner(policy, **options)
        train(folder / name, module, data=held_out())
        after[name] = pass_at_1(learner_of(module, policy), folder / name)
    assert before < 0.35
    assert after["tested"] > before + 0.5
    assert abs(after["tested"] - after["built-in"]) < NOISE, after


def learner_of(module: RLModule, policy: Path) -> RLModule:
    """The trained weights with the built-in sampler, so that both are measured alike."""
    other = learner(policy)
    other.configure_model()
    assert module.model is not None
    assert other.model is not None
    other.model.load_state_dict(module.model.state_dict())
    return other
