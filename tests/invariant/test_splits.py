# SPDX-License-Identifier: Apache-2.0
"""How a batch is split, ordered, padded or spread over ranks changes neither its loss nor its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.distributed import all_sum
from lit_rl.methods import GRPO
from lit_rl.methods.reporting import Ledger
from lit_rl.objectives import GSPO, Aggregation, Clip, OffPolicyCorrection
from lit_rl.rollouts import Rollouts
from lit_rl.storage import load_rollouts, save_rollouts
from lit_rl.testing import check_split_invariance, final_state, loss_and_gradients, make_module, run_on_ranks, train
from tests.invariant.batches import SURROGATES, exact_module, exact_policy, use, varied

TOLERANCE = 1e-10
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"surrogate": surrogate} for name, surrogate in SURROGATES.items()},
    **{f"clip, {a.value}": {"surrogate": Clip(), "aggregation": a} for a in list(Aggregation)[1:]},
    "GSPO, sequence sum": {"surrogate": GSPO(0.01, 0.02), "aggregation": Aggregation.SEQUENCE_SUM},
    "clip, corrected": {"surrogate": Clip(), "correction": OffPolicyCorrection(weight="token", weight_high=1.05)},
}
PLAIN = {"surrogate": Clip(), "aggregation": Aggregation.TOKEN_MEAN, "correction": None}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPO, Rollouts, Path]:
    folder = tmp_path_factory.mktemp("splits")
    module = exact_module(folder / "run", exact_policy(folder / "policy"))
    batch = varied(module.last_rollouts)
    save_rollouts(batch, folder, "batch")
    torch.save(final_state(module), folder / "weights.pt")
    return module, batch, folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_row_order_and_padding_do_not_matter(setting, name: str):
    module, batch, _ = setting
    use(module, **(PLAIN | OBJECTIVES[name]))
    loss, gradients = loss_and_gradients(module, batch, 10**9)
    assert loss != 0
    assert max(g.abs().max() for g in gradients.values()) > 1e-4
    check_split_invariance(module, batch, TOLERANCE)


def share_of_rank(rank: int, folder: Path) -> None:
    """Each rank holds half of the groups; the sum of both gradients must be that of the whole batch on one rank."""
    module = exact_module(folder / "ranks", folder / "policy", strategy="ddp", devices=2)
    module.model.load_state_dict(
        torch.load(folder / "weights.pt"), strict=False
    )  # the tied head has no weights of its own
    whole = load_rollouts(folder, "batch")
    mine = whole.select(whole.group % 2 == rank)
    for name, settings in OBJECTIVES.items():
        use(module, **(PLAIN | settings))
        expected = torch.load(folder / f"{name}.pt")
        module.ledger = Ledger()
        module.model.zero_grad(set_to_none=True)
        batch = mine.clone()
        for term in module.loss_terms:
            term.prepare(module, batch)
        counts = torch.stack([term.averaging(batch)[1] for term in module.loss_terms])
        denominators = all_sum(counts).unbind()
        for rows in module.micro_batch_rows(batch):
            module.micro_loss(batch.select(rows).trim(), denominators, first=False).backward()
        for parameter_name, p in module.model.named_parameters():
            own = torch.zeros_like(p) if p.grad is None else p.grad
            gap = (all_sum(own) - expected[parameter_name]).abs().max()
            assert gap < TOLERANCE, f"{name}: {parameter_name} is off by {gap:.3g}"


def test_two_ranks_add_up_to_one_for_every_objective(setting):
    module, batch, folder = setting
    for name, settings in OBJECTIVES.items():
        use(module, **(PLAIN | settings))
        torch.save(loss_and_gradients(module, batch, 10**9)[1], folder / f"{name}.pt")
    run_on_ranks(share_of_rank, 2, folder)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def test_several_updates_on_a_batch_do_not_depend_on_micro_batches(tmp_path: Path):
    policy = exact_policy(tmp_path / "policy")
    ends = []
    for tokens in (1, 40, 10**6):
        module = make_module(
            policy,
            optimizer=sgd,
            max_rollouts=2,
            prompts_per_step=6,
            updates_per_rollout=3,
            epochs_per_rollout=2,
            micro_batch_tokens=tokens,
        )
        train(tmp_path / str(tokens), module, precision="64-true")
        ends.append(final_state(module))
    for other in ends[1:]:
        for name, value in ends[0].items():
            assert (value - other[name]).abs().max() < TOLERANCE
