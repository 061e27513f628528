# SPDX-License-Identifier: Apache-2.0
"""Two ranks (gloo) select, cut, weigh and decide as one rank does on the same global batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_batches import Module, add_demonstrations, batch
from npo_runs import Diary, Numbers, guided_module
from test_autonpo import EAGER

from lit_rl.callbacks import (
    RECAP,
    AutoNPO,
    DynamicOutlierTruncation,
    EntropyMonitor,
    GRPOLambda,
    NPOSchedule,
    Objective,
    PredictiveDynamicSampling,
)
from lit_rl.objectives import ClipCov, KLCov
from lit_rl.rollouts import Rollouts
from lit_rl.testing import final_state, make_policy, run_on_ranks, train

UNREPEATABLE = ("time/", "speed/", "memory/")
HOOKS: dict[str, tuple[Any, str]] = {
    "dot": (lambda: DynamicOutlierTruncation(alpha=1.0, min_margin=4), "on_rewards"),
    "grpo_lambda": (lambda: GRPOLambda(fraction=0.4), "on_batch_ready"),
    "grpo_lambda_threshold": (lambda: GRPOLambda(threshold=0.6), "on_batch_ready"),
    "pds": (PredictiveDynamicSampling, "on_batch_ready"),
    "autonpo": (AutoNPO, "on_rewards"),
}


def global_batch() -> Rollouts:
    """Twelve groups, some solved, some hopeless, and a few demonstrations behind them."""
    rng = random.Random(2)
    lengths = [[rng.choice((5, 8, 9, 40)) for _ in range(6)] for _ in range(12)]
    correct = [[float(rng.random() < rate) for _ in range(6)] for rate in [1.0, 0.5, 0.1, 0.9] * 3]
    return add_demonstrations(batch(lengths, correct), [3, 50])


def call(name: str, rollouts: Rollouts) -> dict[str, Any]:
    """Run one hook; the rows that it leaves and the numbers that it records."""
    build, hook = HOOKS[name]
    callback, module = build(), Module(prompts_per_step=5)
    if hasattr(callback, "choose"):
        callback.check_setup(module)
    changed = getattr(callback, hook)(None, module, rollouts)
    rollouts = rollouts if changed is None else changed
    draws = rollouts.prompts.draw[rollouts.group]
    rows = [draws, rollouts.lengths, rollouts.correct, rollouts.rewards]
    return {
        "rows": torch.stack([x.double() for x in rows]),
        "numbers": module.numbers(),
        "state": callback.state_dict(),
    }


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam: it turns rounding noise in gradients that are 0 into steps of full size."""
    return torch.optim.SGD(parameters, lr=0.5)


def everything() -> list[Any]:
    objectives = [
        Objective("a", "reward/answer", "reward", "loss:policy"),
        Objective("b", "rollout/length_mean", target="source:toy"),
    ]
    return [
        AutoNPO(**EAGER),
        DynamicOutlierTruncation(alpha=0.5, min_margin=1, min_success=0.5),
        GRPOLambda(fraction=0.5),
        PredictiveDynamicSampling(first=1.5, smallest=1.5, largest=1.5),
        RECAP(objectives, window=1),
    ]


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "everything": (everything, {"max_rollouts": 5}),
    "npo, exact": (lambda: [NPOSchedule(0, 2, samples=8, is_mode="exact")], {"max_rollouts": 3}),
    "kl_cov": (
        lambda: [EntropyMonitor()],
        {"surrogate": KLCov(fraction=0.05), "updates_per_rollout": 2, "max_rollouts": 3},
    ),
    "clip_cov": (
        list,
        {"surrogate": ClipCov(fraction=0.1, cov_low=-9.0, cov_high=9.0), "updates_per_rollout": 2, "max_rollouts": 3},
    ),
}


def run(name: str, folder: Path, policy: Path, world: int) -> dict[str, Any]:
    """A whole run; what it measured, decided and learned."""
    callbacks, options = RUNS[name]
    module = guided_module(policy, optimizer=sgd, **options)
    numbers, diary = Numbers(), Diary()
    parallel = {"strategy": "ddp", "devices": world} if world > 1 else {}
    train(folder / name, module, [*callbacks(), diary, numbers], precision="64-true", **parallel)
    measured = {
        clock: {k: v for k, v in logged.items() if not k.startswith(UNREPEATABLE)}
        for clock, logged in numbers.logged.items()
    }
    return {"steps": diary.steps, "measured": measured, "weights": final_state(module)}


def on_rank(rank: int, folder: Path, policy: Path) -> None:
    rollouts = global_batch()
    half = torch.arange(len(rollouts.prompts)) // 7 == rank  # seven groups each, in drawing order
    torch.save({name: call(name, rollouts.select_groups(half).trim()) for name in HOOKS}, folder / f"hooks{rank}.pt")
    results = {name: run(name, folder / "two", policy, 2) for name in RUNS}
    torch.save(results, folder / f"runs{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(on_rank, 2, folder, make_policy(folder / "policy"))
    return folder


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_does_on_two_ranks_what_it_does_on_one(folder: Path, name: str) -> None:
    expected = call(name, global_batch())
    parts = [torch.load(folder / f"hooks{rank}.pt", weights_only=False)[name] for rank in (0, 1)]
    rows = torch.cat([part["rows"] for part in parts], 1)
    assert torch.equal(torch.nan_to_num(rows, nan=-1), torch.nan_to_num(expected["rows"], nan=-1))
    for part in parts:
        assert part["numbers"] == pytest.approx(expected["numbers"])
        assert str(part["state"]) == str(expected["state"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_ranks_is_the_run_on_one(folder: Path, tmp_path: Path, name: str) -> None:
    one = run(name, tmp_path, folder / "policy", 1)
    for rank in (0, 1):
        two = torch.load(folder / f"runs{rank}.pt", weights_only=False)[name]
        assert two["steps"] == one["steps"]
        for clock, expected in one["measured"].items():
            assert two["measured"][clock] == pytest.approx(expected, rel=1e-6, abs=1e-9), f"step {clock}"
        for parameter, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][parameter], value, rtol=1e-9, atol=1e-11)
    if name == "everything":
        assert one["steps"] != list(range(5)), "AutoNPO did not go back"
