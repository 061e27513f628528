# SPDX-License-Identifier: Apache-2.0
"""The contracts that every component must keep, one call each: for ours and for yours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_rl.data import PromptDataModule
from lit_rl.methods.module import RLModule
from lit_rl.methods.reporting import Ledger
from lit_rl.rollouts import Rollouts
from lit_rl.testing.toys import ToyData, final_state, make_module, make_policy, train

Callbacks = Callable[[], Sequence[Callback]]
Module = Callable[[Path], RLModule]
Data = Callable[[], PromptDataModule]


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Fail, naming the parameter and the largest difference, unless all weights are bit-equal."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise AssertionError(f"{name} differs by up to {(value - second[name]).abs().max():.3g}")


def check_neutral(folder: Path, callbacks: Callbacks, module: Module = make_module) -> None:
    """With these callbacks (at their neutral arguments) a run is bit-identical to the run without them.

    Args:
        folder: an empty folder.
        callbacks: builds the callbacks.
        module: builds the method from the folder of a policy.
    """
    policy = make_policy(folder / "policy")
    plain, changed = module(policy), module(policy)
    train(folder / "plain", plain)
    train(folder / "changed", changed, callbacks())
    assert_same_weights(final_state(plain), final_state(changed))


def check_resume(
    folder: Path, callbacks: Callbacks = list, module: Module = make_module, at: int = 3, data: Data = ToyData
) -> None:
    """Stopping after ``at`` steps and resuming gives the weights and callback states of an uninterrupted run.

    Args:
        folder: an empty folder.
        callbacks: builds the callbacks.
        module: builds the method from the folder of a policy.
        at: clock at which the run is interrupted.
        data: builds the datamodule.
    """
    policy = make_policy(folder / "policy")
    whole, part, rest = module(policy), module(policy), module(policy)
    first = callbacks()
    train(folder / "whole", whole, first, data=data())
    stopper = StopAt(at)
    train(folder / "parts", part, [*callbacks(), stopper], data=data())
    assert part.clock == at, f"the run was to stop at clock {at} but stopped at {part.clock}"
    second = callbacks()
    saved = folder / "parts" / "checkpoints" / f"clock{at:08d}.ckpt"
    train(folder / "parts", rest, second, checkpoint=saved, data=data())
    assert_same_weights(final_state(whole), final_state(rest))
    assert (whole.clock, whole.rollout_step, whole.cursor) == (rest.clock, rest.rollout_step, rest.cursor)
    for mine, theirs in zip(first, second):
        assert str(mine.state_dict()) == str(theirs.state_dict()), f"{type(mine).__name__} resumed to another state"


class StopAt(Callback):
    """Stops a run at a clock, as a user would with Ctrl-C at a rollout boundary.

    Args:
        clock: when.
    """

    def __init__(self, clock: int) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Stop."""
        if pl_module.clock >= self.clock:
            trainer.should_stop = True


def loss_and_gradients(module: RLModule, batch: Rollouts, micro_batch_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step on a stored batch, without taking the step.

    Args:
        module: a method inside (or after) a fit, with its model loaded.
        batch: rollouts with advantages.
        micro_batch_tokens: how finely the batch is split.
    """
    module.ledger = Ledger()
    module.micro_batch_tokens = micro_batch_tokens
    module.model.zero_grad(set_to_none=True)
    denominators = tuple(term.averaging(batch)[1] for term in module.loss_terms)
    total = 0.0
    for rows in module.micro_batch_rows(batch):
        loss = module.micro_loss(batch.select(rows).trim(), denominators, first=False)
        loss.backward()
        total += float(loss.detach())
    gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}
    return total, gradients


def check_split_invariance(module: RLModule, batch: Rollouts, tolerance: float = 1e-10) -> None:
    """Loss and gradients do not depend on micro-batch size, row order or padding (run it in float64).

    Args:
        module: a method inside (or after) a fit, its model in float64.
        batch: rollouts with advantages.
        tolerance: largest absolute difference.
    """
    reference, gradients = loss_and_gradients(module, batch, 10**9)
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)))
    for variant in (batch, shuffled, batch.pad(batch.width + 5)):
        for tokens in (10**9, 4 * (batch.width + 8), 1):
            loss, other = loss_and_gradients(module, variant, tokens)
            assert abs(loss - reference) < tolerance, f"the loss moves by {loss - reference:.3g} with {tokens} tokens"
            for name, gradient in gradients.items():
                gap = float((gradient - other[name]).abs().max())
                assert gap < tolerance, f"the gradient of {name} moves by {gap:.3g} with {tokens} tokens"
