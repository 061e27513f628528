# SPDX-License-Identifier: Apache-2.0
"""Two ranks (gloo, CPU) compute what one rank computes, agree on when to stop, and resume."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_rl.checkpoint import RolloutCheckpoint, last_good_checkpoint
from lit_rl.distributed import all_gather_concat, broadcast_object, gather_ragged, rank, union_of_names
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import RLModule
from lit_rl.policies import FrozenCopy
from lit_rl.testing import assert_same_weights, final_state, make_module, make_policy, run_on_ranks, train
from tests.core.runs import UNREPEATABLE, Refill


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam: it turns rounding noise in gradients that are 0 into steps of full size."""
    return torch.optim.SGD(parameters, lr=0.5)


class Keep(RolloutCallback):
    """Trains on some prompts only, chosen by their place in the global batch of four."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = places

    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> Any:
        return rollouts.select_groups(torch.isin(rollouts.prompts.draw % 4, torch.tensor(self.places)))


class Record(Callback):
    """Keeps what each step measured."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        self.steps.append({k: v for k, v in metrics.items() if not k.startswith(UNREPEATABLE)})


def run(folder: Path, policy: Path, world: int, **settings: Any) -> dict[str, Any]:
    places = settings.pop("places", (0, 1, 2, 3))
    options = {"optimizer": sgd, "max_rollouts": 3, "reference": FrozenCopy(), "kl_coef": 0.1, "max_grad_norm": 0.2}
    module = make_module(policy, **{**options, **settings})
    record = Record()
    parallel = {"strategy": "ddp", "devices": world} if world > 1 else {}
    train(folder, module, [Keep(places), record], precision="64-true", **parallel)
    return {"weights": final_state(module), "steps": record.steps, "cursor": module.cursor}


SCENARIOS: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "as many micro-batches as rows": {"micro_batch_tokens": 1},
    "different numbers of micro-batches": {"micro_batch_tokens": 1, "places": (0, 1, 2)},
    "a rank without anything to train on": {"places": (0, 1)},
    "nothing to train on anywhere": {"places": ()},
    "several updates": {"updates_per_rollout": 2, "epochs_per_rollout": 2, "micro_batch_tokens": 40},
    "statistics over the batch": {"advantage": ("batch", "batch")},
}


def build(settings: dict[str, Any]) -> dict[str, Any]:
    from lit_rl.objectives import AdvantageNormalizer

    if "advantage" in settings:
        center, scale = settings["advantage"]
        return settings | {"advantage": AdvantageNormalizer(center=center, scale=scale)}
    return dict(settings)


def run_scenarios(rank: int, folder: Path, policy: Path) -> None:
    for i, settings in enumerate(SCENARIOS.values()):
        result = run(folder / f"{i}", policy, 2, **build(settings))
        torch.save(result, folder / f"{i}-rank{rank}.pt")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not Qwen2: its norms compute in float32, which makes 1e-8 out of the last bit of a float64.
    return make_policy(tmp_path_factory.mktemp("policy"), "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.fixture(scope="module")
def on_two_ranks(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(run_scenarios, 2, folder, policy)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_like_one(on_two_ranks: Path, policy: Path, tmp_path: Path, name: str):
    single = run(tmp_path, policy, 1, **build(SCENARIOS[name]))
    first, second = (torch.load(on_two_ranks / f"{list(SCENARIOS).index(name)}-rank{r}.pt") for r in range(2))
    for other in (first, second):
        assert other["cursor"] == single["cursor"]
        for key, value in single["weights"].items():
            assert (value - other["weights"][key]).abs().max() < 1e-10, key
        for mine, theirs in zip(single["steps"], other["steps"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)
    changed = any(not torch.equal(v, final) for v, final in zip(initial(policy), single["weights"].values()))
    assert changed == (name != "nothing to train on anywhere")


def initial(policy: Path) -> list[torch.Tensor]:
    from lit_rl.policies import Policy

    return [p.detach().double() for p in Policy(str(policy)).load()[0].parameters()]


class SignalOneRank(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.clock == 3 and rank() == 1:
            signal.raise_signal(signal.SIGTERM)


def stop_and_resume(rank: int, folder: Path, policy: Path) -> None:
    def fit(name: str, *callbacks: Callback, checkpoint: Path | None = None) -> RLModule:
        module = make_module(policy, max_rollouts=6, updates_per_rollout=2)
        saver = RolloutCheckpoint(every_n_rollouts=100)
        train(folder / name, module, [Refill(), *callbacks, saver], checkpoint, strategy="ddp", devices=2)
        return module

    whole, cut = fit("whole"), fit("cut", SignalOneRank())
    assert cut.clock == 3
    rest = fit("cut", checkpoint=last_good_checkpoint(folder / "cut"))
    assert rest.clock == 6
    assert_same_weights(final_state(whole), final_state(rest))


def test_a_signal_to_one_rank_stops_both_and_both_resume_exactly(policy: Path, tmp_path: Path):
    run_on_ranks(stop_and_resume, 2, tmp_path, policy)


def collectives(rank: int) -> None:
    mine = torch.arange(3 * rank).reshape(-1, 3)  # nothing on rank 0
    assert [len(x) for x in gather_ragged(mine)] == [0, 1]
    everything, where = all_gather_concat(mine)
    assert everything.tolist() == [[0, 1, 2]]
    assert everything[where].tolist() == mine.tolist()
    assert union_of_names(["b", "a"] if rank == 0 else ["c", "a"]) == ["b", "a", "c"]
    assert broadcast_object(rank + 7) == 7


def test_collectives_take_ragged_and_empty_parts():
    run_on_ranks(collectives, 2)
