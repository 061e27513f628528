# SPDX-License-Identifier: Apache-2.0
"""Gradient norms of single loss terms: naive gradients, split invariance, coefficients, and an untouched run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.callbacks import TermGradients
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import KDRL
from lit_rl.policies import Checkpoint, FrozenCopy
from lit_rl.testing import check_neutral, check_two_ranks, loss_and_gradients, make_module, make_policy, train

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Seen(RolloutCallback):
    """What the module logged at each step; also left in the folder of the run."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.numbers.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient/")})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(exist_ok=True)
        (folder / "norms.json").write_text(json.dumps(self.numbers))


def taught(folder: Path, **options: Any) -> Any:
    policy = make_policy(folder / "policy", "gpt2", **NO_DROPOUT)
    teacher = make_policy(folder / "teacher", "gpt2", seed=5, **NO_DROPOUT)
    return make_module(policy, KDRL, teacher=Checkpoint(str(teacher)), **({"kd_coef": 0.3, "group_size": 4} | options))


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())


def test_norms_are_those_of_each_term_alone(tmp_path: Path):
    """Gradients of the whole loss with all other coefficients at 0, by the module's own code, at the same weights."""
    seen, frozen = Seen(), {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    module = taught(tmp_path, max_rollouts=1, micro_batch_tokens=60, **frozen)
    train(tmp_path / "run", module, [TermGradients(every=1), seen])
    (numbers,) = seen.numbers
    batch = module.last_rollouts
    _, whole = loss_and_gradients(module, batch, 10**6)
    module.kd_coef = 0.0
    _, policy = loss_and_gradients(module, batch, 10**6)
    kd = {name: whole[name] - policy[name] for name in whole}
    assert numbers["gradient/policy"] == pytest.approx(norm(policy), rel=1e-4)
    assert numbers["gradient/kd"] == pytest.approx(norm(kd), rel=1e-4)
    assert numbers["gradient/kd_ratio"] == pytest.approx(norm(kd) / norm(policy), rel=1e-4)
    assert set(numbers) == {"gradient/policy", "gradient/kd", "gradient/kd_ratio"}


def test_several_optimizer_steps_are_averaged_and_steps_between_are_skipped(tmp_path: Path):
    seen = Seen()
    module = taught(tmp_path, max_rollouts=3, updates_per_rollout=2, prompts_per_step=4)
    train(tmp_path / "run", module, [TermGradients(every=2, relative_to="kd"), seen])
    assert [bool(step) for step in seen.numbers] == [True, False, True]
    for step in seen.numbers[::2]:
        assert step["gradient/policy_ratio"] == pytest.approx(step["gradient/policy"] / step["gradient/kd"])
        assert "gradient/kd_ratio" not in step


def test_a_term_without_coefficient_is_left_out(tmp_path: Path):
    seen = Seen()
    module = taught(tmp_path, max_rollouts=1, kd_coef=0.0)
    train(tmp_path / "run", module, [TermGradients(every=1), seen])
    assert set(seen.numbers[0]) == {"gradient/policy"}


def test_training_is_untouched(tmp_path: Path):
    check_neutral(tmp_path, lambda: [TermGradients(every=1)], lambda policy: make_module(policy, max_rollouts=3))


def measured() -> list[RolloutCallback]:
    return [TermGradients(every=1), Seen()]


def drifting(policy: Path) -> KDRL:
    """Distilled from its own beginning, away from which it drifts. One rank of two may have nothing to train."""
    return make_module(policy, KDRL, teacher=FrozenCopy(), kd_coef=0.5, kd_mask="group", group_size=4, max_rollouts=3)


@pytest.mark.slow
def test_two_ranks_log_the_norms_of_one(tmp_path: Path):
    check_two_ranks(tmp_path, measured, drifting)
    one, *both = (json.loads((tmp_path / run / "norms.json").read_text()) for run in ("one", "rank0", "rank1"))
    assert any("gradient/kd" in step for step in one)
    for numbers in both:
        assert [*numbers] == [{name: pytest.approx(v, rel=1e-4, abs=1e-8) for name, v in step.items()} for step in one]


def test_an_impossible_interval_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TermGradients(every=0)
