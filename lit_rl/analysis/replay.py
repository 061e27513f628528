# SPDX-License-Identifier: Apache-2.0
"""Recompute the loss terms of a logged step from its stored tensors and a checkpoint of that step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_rl.methods.reporting import Ledger
from lit_rl.rollouts import Rollouts


@dataclass
class ReplayedTerm:
    """One loss term as it was logged and as it comes out again.

    Attributes:
        name: the term.
        logged: value in the run's TensorBoard files, None if it is not there.
        replayed: value recomputed from the stored batch.
    """

    name: str
    logged: float | None
    replayed: float


def replay_terms(module: Any, batch: Rollouts) -> dict[str, float]:
    """Loss terms of a stored batch under the module's present weights: name -> value.

    Args:
        module: a method whose policy is loaded (``configure_model`` was called) and whose ``loss_terms`` are set.
        batch: a stored batch of one optimizer step, with advantages and the signals that the terms require.
    """
    module.ledger = Ledger()
    module.model.train()
    counts = [term.averaging(batch)[1] for term in module.loss_terms]
    with torch.no_grad():
        for rows in module.micro_batch_rows(batch):
            module.micro_loss(batch.select(rows).trim(), tuple(counts), first=False)
    return {
        n.removeprefix("loss/"): float(total) for n, (total, _) in module.ledger.signals.sums.items() if "loss/" in n
    }


def logged_values(run: Path, clock: int) -> dict[str, float]:
    """The scalars that a run logged at a clock: name -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            if event.step == clock:
                found[name] = event.value
    return found
