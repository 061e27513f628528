# SPDX-License-Identifier: Apache-2.0
"""The contracts that every component must keep, one call each: for ours and for yours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_rl.checkpoint import file_name
from lit_rl.data import PromptDataModule
from lit_rl.methods.module import RLModule
from lit_rl.methods.reporting import Ledger
from lit_rl.rollouts import Rollouts
from lit_rl.testing.ranks import run_on_ranks
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
    """Stopping after ``at`` steps and resuming gives the run that one gets without stopping.

    The run is stopped between two steps, and once more in the middle of sampling, so that a step is undone. Weights,
    optimizer, clocks, cursor, sampler and callback states must be those of an uninterrupted run, bit for bit.

    Args:
        folder: an empty folder.
        callbacks: builds the callbacks.
        module: builds the method from the folder of a policy.
        at: clock at which the run is interrupted.
        data: builds the datamodule.
    """
    policy = make_policy(folder / "policy")
    whole, first = module(policy), callbacks()
    train(folder / "whole", whole, first, data=data())
    for how, stopper in (("between two steps", StopAt(at)), ("while sampling", InterruptAt(at))):
        part, rest, second = module(policy), module(policy), callbacks()
        run = folder / how.replace(" ", "-")
        train(run, part, [*callbacks(), stopper], data=data())
        assert part.clock == at, f"the run was to stop at clock {at} but stopped at {part.clock}"
        train(run, rest, second, checkpoint=run / "checkpoints" / file_name(at), data=data())
        with _advice_on_state(how):
            assert_same_weights(final_state(whole), final_state(rest))
            assert (whole.clock, whole.rollout_step, whole.cursor) == (rest.clock, rest.rollout_step, rest.cursor)
            for mine, theirs in zip(first, second):
                assert_same_state(mine.state_dict(), theirs.state_dict(), f"{type(mine).__name__}, stopped {how},")
            ends = [
                torch.load(x / "checkpoints" / file_name(whole.clock), weights_only=True)
                for x in (folder / "whole", run)
            ]
            for name in ("optimizer_states", "lr_schedulers", "lit_rl"):
                assert_same_state(ends[0][name], ends[1][name], f"The run, stopped {how},")


@contextmanager
def _advice_on_state(how: str) -> Iterator[None]:
    """Add to a failure inside what most often is its cause."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(
            f"{error}\nA run that was stopped {how} does not go on as it would have: what a component remembers "
            "between steps it must return from `state_dict` and restore in `load_state_dict`."
        ) from error


def assert_same_state(mine: Any, theirs: Any, label: str = "state") -> None:
    """Fail, naming the entry, unless two nested states are equal to the last bit."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        same = mine.shape == theirs.shape and bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all())
    elif isinstance(mine, dict) and isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), f"{label} resumed with {sorted(theirs)} instead of {sorted(mine)}"
        for name in mine:
            assert_same_state(mine[name], theirs[name], f"{label} {name}")
        return
    elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(mine) == len(theirs):
        for i, pair in enumerate(zip(mine, theirs)):
            assert_same_state(*pair, f"{label} [{i}]")
        return
    else:
        same = mine == theirs or (mine != mine and theirs != theirs)
    assert same, f"{label} is {theirs} after resuming instead of {mine}"


class StopAt(Callback):
    """Ends a run after a step.

    Args:
        clock: when.
    """

    def __init__(self, clock: int) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Stop."""
        if pl_module.clock >= self.clock:
            trainer.should_stop = True


class InterruptAt(Callback):
    """Interrupts a run while it samples, as Ctrl-C does: the step is undone.

    Args:
        clock: how many steps are done by then.
    """

    def __init__(self, clock: int) -> None:
        self.clock, self.now = clock, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Decide whether this is the step."""
        self.now = pl_module.clock >= self.clock

    def stop_requested(self) -> bool:
        """What samplers look at after every token."""
        return self.now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Stop."""
        trainer.should_stop = trainer.should_stop or self.now


def check_two_ranks(
    folder: Path, callbacks: Callbacks = list, module: Module = make_module, tolerance: float = 1e-9
) -> None:
    """Two ranks (CPU processes) end with the weights that one ends with.

    In float64 and with plain gradient descent, so that only a wrong sum, not rounding, can make a difference.

    Args:
        folder: an empty folder.
        callbacks: builds the callbacks; a function of a module, not a lambda, because it is sent to the processes.
        module: builds the method from the folder of a policy; likewise.
        tolerance: largest absolute difference of a weight.
    """
    # GPT-2 without dropout: the norms of Llama and its like compute in float32, whatever the precision.
    policy = make_policy(folder / "policy", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    _exact_run(folder / "one.pt", policy, callbacks, module, 1)
    run_on_ranks(_on_a_rank, 2, folder, policy, callbacks, module)
    one = torch.load(folder / "one.pt")
    for rank in range(2):
        for name, value in torch.load(folder / f"rank{rank}.pt").items():
            gap = float((value - one[name]).abs().max())
            assert gap < tolerance, f"{name} differs by {gap:.3g} between one rank and rank {rank} of two"


def _on_a_rank(rank: int, folder: Path, policy: Path, callbacks: Callbacks, module: Module) -> None:
    _exact_run(folder / f"rank{rank}.pt", policy, callbacks, module, 2)


def _exact_run(result: Path, policy: Path, callbacks: Callbacks, module: Module, ranks: int) -> None:
    method = module(policy)
    method.optimizer_factory = _gradient_descent
    parallel: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    train(result.with_suffix(""), method, callbacks(), precision="64-true", **parallel)
    torch.save(final_state(method), result)


def _gradient_descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


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
    batch = batch.clone()  # preparing adds signals to it
    for term in module.loss_terms:
        term.prepare(module, batch)
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
