# SPDX-License-Identifier: Apache-2.0
"""Learning really happens: on a toy task the reward rises and held-out accuracy follows, also across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lit_rl.data import EvalSet, GeneratedStream
from lit_rl.methods import SFT
from lit_rl.testing import StopAt, ToyData, make_module, make_policy, train
from tests.learning.lesson import STEPS, held_out, learner, pass_at_1

pytestmark = pytest.mark.learning


class Rewards(Callback):
    """The mean reward of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        self.values.append(metrics["reward/mean"])


@pytest.mark.parametrize(
    ("precision", "options"),
    [("32-true", {}), ("bf16-mixed", {}), ("32-true", {"updates_per_rollout": 2, "epochs_per_rollout": 2})],
    ids=["single precision", "bf16-mixed", "four updates a batch"],
)
def test_the_reward_rises_by_half_and_held_out_accuracy_follows(tmp_path: Path, precision: str, options: Any):
    policy = make_policy(tmp_path / "policy")
    before = pass_at_1(learner(policy), tmp_path)
    rewards, module = Rewards(), learner(policy, **options)
    train(tmp_path, module, [rewards], data=held_out(), precision=precision)
    after = pass_at_1(module, tmp_path)
    assert before < 0.35  # a fifth of the characters are digits
    assert sum(rewards.values[-10:]) / 10 > sum(rewards.values[:10]) / 10 + 0.4
    assert after > before + 0.5


def test_a_resumed_run_learns_on_from_where_it_was(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    first, second = Rewards(), Rewards()
    half = learner(policy)
    train(tmp_path, half, [first, StopAt(STEPS // 2)], data=held_out())
    module = learner(policy)
    checkpoint = tmp_path / "checkpoints" / f"clock{STEPS // 2:08d}.ckpt"
    train(tmp_path, module, [second], checkpoint=checkpoint, data=held_out())
    assert len(first.values) == len(second.values) == STEPS // 2
    assert abs(second.values[0] - first.values[-1]) < 0.25
    assert pass_at_1(module, tmp_path) > pass_at_1(learner(policy), tmp_path) + 0.5


class Demonstrations(ToyData):
    """The answer of each prompt, written out."""

    def build(self, stage: str) -> None:
        def record(rng: Any) -> dict[str, Any]:
            digit = rng.randrange(10)
            return {"prompt": f"{digit}+1=", "answer": str(digit), "completion": str(digit)}

        self.train_stream = GeneratedStream(record, seed=0, source="toy")
        self.eval_sets = [EvalSet("toy", GeneratedStream(record, seed=1, source="toy"), limit=256, temperature=0.0)]


def test_supervised_training_on_demonstrations_makes_them_likely(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    module = make_module(policy, SFT, prompts_per_step=32, group_size=1, max_rollouts=STEPS)
    losses: list[float] = []

    class Losses(Callback):
        def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
            losses.append(metrics["loss/sft"])

    train(tmp_path, module, [Losses()], data=Demonstrations())
    assert losses[0] > 3.5  # about ln 64
    assert losses[-1] < 0.2
