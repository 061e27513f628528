# SPDX-License-Identifier: Apache-2.0
"""The hooks between the stages of a training step, and how they are dispatched.

Any Lightning callback may implement any of the hooks below; `RolloutCallback` lists them with their meaning. They run
in the order of ``trainer.callbacks``. The dispatcher compares every batch before and after each hook and records the
difference in ``rollouts.edits`` (that of requests too), so a callback that edits silently still shows up.

Within a step: ``on_plan``, then in rounds ``on_rollout_request``, ``on_rollouts``, ``on_rewards``, ``on_collected``;
then ``on_batch_ready`` and ``on_advantages``; for each optimizer step ``on_loss_weights`` and for each of its
micro-batches ``on_micro_batch`` and ``on_loss_terms``; at the end ``on_metrics``. Lightning's own
``on_train_batch_end`` follows, when every callback has taken the step in: the place to rewind the run. Between two
steps, when the last one is logged and validated, comes ``on_step_boundary``: the place to save it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl.rollouts import Batch, Edit, Rollouts
from lit_rl.spelling import did_you_mean

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule
    from lit_rl.methods.terms import Current, LossTerm
    from lit_rl.samplers.base import RolloutRequest

ValueT = TypeVar("ValueT")


class RolloutCallback(Callback):
    """A Lightning callback with the stage hooks of lit-rl. Implement only those you need.

    A hook that receives a batch edits it in place and returns None, or returns the batch to go on with (that is how
    rows are dropped). What a callback remembers belongs into its ``state_dict``. With several ranks each hook runs on
    each rank with that rank's rows; a checkpoint holds the state of rank 0, so remember reduced numbers only
    (`lit_rl.distributed.all_sum` and its neighbours).

    Attributes:
        requires: signals that must exist before the hooks of the update run, such as ``"logprobs.reference"`` or
            ``"correct"``. Setup finds a provider for each or refuses with a sentence.
        rewinds: whether this callback's state goes back when a run is rewound to an earlier rollout step. Keep it true
            for anything that should replay identically, false for the memory of whoever rewinds.
    """

    requires: frozenset[str] = frozenset()
    rewinds: bool = True

    def check_setup(self, module: RLModule) -> None:
        """Raise ``ValueError`` with a sentence if this callback cannot work with the module's settings."""

    def on_step_boundary(self, trainer: Trainer, module: RLModule) -> None:
        """Between two steps: all about the last one is decided and logged, nothing of the next has begun."""

    def on_plan(self, trainer: Trainer, module: RLModule, prompts: int) -> int | None:
        """How many prompts should the first round of this step draw on this rank? Return a number or None."""

    def on_rollout_request(self, trainer: Trainer, module: RLModule, request: RolloutRequest) -> RolloutRequest | None:
        """Before sampling. Change the sampling settings, the group sizes or the prompts."""

    def on_rollouts(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> Rollouts | None:
        """After sampling, before scoring."""

    def on_rewards(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> Rollouts | None:
        """After scoring. Change terms, weights or rows; ``module.score(rollouts)`` runs the rewards again."""

    def on_collected(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> int | None:
        """With everything collected so far. Return how many more prompts this rank should draw, or None for enough."""

    def on_batch_ready(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> Rollouts | None:
        """Once a step, when no callback asks for more: the whole batch of this rank, before recall and credit."""

    def on_advantages(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> Rollouts | None:
        """After advantages were computed (``rollouts.advantages``)."""

    def on_loss_weights(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> Rollouts | None:
        """Once for each optimizer step, with its whole mini-batch on this rank. Change ``loss_weights``."""

    def on_micro_batch(self, trainer: Trainer, module: RLModule, micro: Rollouts, current: Current) -> None:
        """With the policy's log-probabilities of a micro-batch, before its loss. Look and record, change nothing."""

    def on_loss_terms(self, trainer: Trainer, module: RLModule, terms: list[LossTerm]) -> None:
        """Before each backward pass of a micro-batch. Change coefficients, nothing else."""

    def on_metrics(self, trainer: Trainer, module: RLModule, metrics: dict[str, float]) -> None:
        """With everything that the step measured, the same on every rank, before the clocks advance.

        Names that this step did not measure are absent; a number put here, the same on every rank, is logged too, and
        callbacks that come later see it. React here and keep what you remember in ``state_dict``: what
        is saved or rewound in ``on_train_batch_end`` then includes it, whatever the order of the callbacks.
        """

    def on_evaluation_batch(self, trainer: Trainer, module: RLModule, rollouts: Rollouts) -> None:
        """With each batch of an evaluation set, sampled and scored: add it to metrics of your own."""

    def on_evaluation_metrics(self, trainer: Trainer, module: RLModule, metrics: dict[str, float], prefix: str) -> None:
        """At the end of an evaluation, before it is logged: add numbers that are the same on every rank.

        ``prefix`` (``val`` or ``test``) begins every name.
        """

    def on_rewind(self, trainer: Trainer, module: RLModule, step: int) -> None:
        """After a run went back to rollout step ``step``: forget what belongs to the abandoned future.

        Only needed with ``rewinds = False``; the state of the others was restored.
        """


@runtime_checkable
class Traced(Protocol):
    """What the dispatcher compares before and after a hook: a batch, or a request."""

    edits: list[Edit]

    def __len__(self) -> int: ...

    def clone(self) -> Any:
        """A copy that stays as it is."""

    def diff(self, before: Any, skip: Collection[str] = ()) -> dict[str, int]:
        """Names of what differs, and in how many entries."""


HOOKS = tuple(name for name in vars(RolloutCallback) if name.startswith("on_"))


def dispatch(trainer: Trainer, module: LightningModule, hook: str, value: ValueT) -> ValueT:
    """Run one hook of every callback over ``value`` and return what to go on with.

    Args:
        trainer: the trainer whose callbacks run, in order.
        module: the method.
        hook: name of the hook.
        value: what the hook receives. A batch or a request is compared before and after each callback.
    """
    for callback in callbacks_with(trainer, hook):
        before, marks = (value.clone(), _marks(value)) if isinstance(value, Traced) else (None, {})
        result = getattr(callback, hook)(trainer, module, value)
        value = value if result is None else result
        if before is not None and isinstance(value, Traced):
            now = _marks(value)
            untouched = {name for name, mark in marks.items() if mark.same_as(now.get(name))}
            value.edits += edits_of(hook, callback, before, value, untouched)
    return value


def edits_of(
    hook: str, callback: Callback, before: Traced, after: Traced, untouched: Collection[str] = ()
) -> list[Edit]:
    """What a callback changed: signals or settings by name, or the rows if some were dropped or added.

    Args:
        hook: in which hook.
        callback: who.
        before: a clone of the batch or request as it was.
        after: the batch or request as it is.
        untouched: signals that certainly did not change and need no comparison.
    """
    name = type(callback).__name__
    if len(after) != len(before):
        return [Edit(hook, name, "rows", abs(len(after) - len(before)))]
    return [Edit(hook, name, column, entries) for column, entries in after.diff(before, untouched).items()]


class _Mark(NamedTuple):
    """A tensor and how often it had been written to: comparing marks is free, comparing batches takes milliseconds."""

    tensor: Tensor
    version: int

    def same_as(self, other: _Mark | None) -> bool:
        return other is not None and self.tensor is other.tensor and self.version == other.version >= 0


def _marks(value: Traced) -> dict[str, _Mark]:
    signals = {**value.row, **value.token} if isinstance(value, Batch) else {}
    # Inference tensors have no version: never the same.
    return {name: _Mark(t, -1 if t.is_inference() else t._version) for name, t in signals.items()}


def callbacks_with(trainer: Trainer, hook: str) -> list[Any]:
    """The callbacks that implement a hook, in order; one that only inherits the empty hook does not count."""
    empty = getattr(RolloutCallback, hook)
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        method = getattr(type(callback), hook, None)
        if method is not None and method is not empty:
            found.append(callback)
    return found


def warn_of_misspelt_hooks(callback: Callback) -> None:
    """Warn of methods that look like hooks and that nobody will call."""
    if not isinstance(callback, RolloutCallback):
        return
    known = [name for name in dir(RolloutCallback) if name.startswith("on_")]
    for name in sorted(n for n in dir(callback) if n.startswith("on_") and n not in known):
        rank_zero_warn(f"{type(callback).__name__}.{name} is no hook: nothing calls it.{did_you_mean(name, known)}")


def required_signals(trainer: Trainer) -> dict[str, list[str]]:
    """Signal name -> names of the callbacks that require it."""
    wanted: dict[str, list[str]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        requires: Iterable[str] = getattr(callback, "requires", ())
        for signal in requires:
            wanted.setdefault(signal, []).append(type(callback).__name__)
    return wanted
