# SPDX-License-Identifier: Apache-2.0
"""Asynchronous rollouts: the next batch is sampled while the current one trains."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.objectives import OffPolicyCorrection
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Progress, RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.decoder import autocast_dtype
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.workers import (
    Cancel,
    Job,
    ProcessWorker,
    Result,
    ThreadWorker,
    Weights,
    Worker,
    WorkerDied,
    WorkerSettings,
)
from lit_rl.samplers.wrapping import SamplerWrapper, StalenessMeter, prompts_in_parts, unstarted
from lit_rl.storage import pack_rollouts, unpack_rollouts

_log = logging.getLogger(__name__)
_PATIENCE = 0.1  # seconds between two looks at whether the run is to stop


class AsyncSampler(SamplerWrapper):
    """A worker with its own copy of the policy samples ahead of the trainer, by a bounded number of steps.

    The first step draws ``staleness`` + 1 times the prompts that it needs and every later one as many as it needs;
    batches are returned in the order in which they were drawn. So a batch that trains at step k was sampled from
    weights of step k - ``staleness`` or later, and at most that many batches wait (the capacity rule of AReaL, arXiv
    2505.24298). Every token carries the version of its weights.

    Tokens of earlier versions are never taken for the current policy's: the loss corrects for them, and a method that
    does not is refused.

    A worker that dies is started again with the weights it should have, and what it had not returned is sampled again.
    For a checkpoint, batches under way are finished and stored: a step with a checkpoint gains nothing from sampling
    ahead, and resuming is exact. Requests outside of training (evaluation) do not go to the worker but to the inner
    sampler in this process, if that shares the trainer's weights.

    Args:
        inner: generates, in the worker. Default `HFSampler`.
        staleness: how many steps the worker may be ahead; 0 waits for each batch.
        correction: ``"truncated"`` weights each token with min(π_old / π_sampler, ``max_weight``); ``"behaviour"``
            takes π_sampler for π_old, so that the ratio of the surrogate corrects. A method's own ``correction`` has
            precedence over the former.
        max_weight: bound of the weight.
        worker: ``"process"`` needs no care for the interpreter lock and holds its own copy of all weights;
            ``"thread"`` is for engines that release it, and shares the weights that are not trained.
        device: where the worker's copy lives, such as ``"cuda:1"``; None: where the policy is.
        threads: torch's threads in a worker process. On a CPU, divide the cores between worker and trainer.
        deterministic: sample each batch from exactly the weights of the step that drew it, though newer ones may be
            there. With ``staleness=1`` that costs nothing.
        max_restarts: how often a worker may die in a run.

    Raises:
        ValueError: an argument is out of range.
    """

    carries_over = True

    def __init__(
        self,
        inner: RolloutSampler | None = None,
        staleness: int = 1,
        correction: Literal["truncated", "behaviour"] = "truncated",
        max_weight: float = 2.0,
        worker: Literal["process", "thread"] = "process",
        device: str | None = None,
        threads: int | None = None,
        deterministic: bool = False,
        max_restarts: int = 3,
    ) -> None:
        super().__init__(inner or HFSampler())
        if staleness < 0:
            raise ValueError(f"staleness must not be negative, got {staleness}.")
        if correction not in ("truncated", "behaviour"):
            raise ValueError(
                f"correction must be 'truncated' or 'behaviour', got {correction!r}: completions sampled ahead are "
                "never on-policy, so there is no choice without one."
            )
        if worker not in ("process", "thread"):
            raise ValueError(f"worker must be 'process' or 'thread', got {worker!r}.")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, got {max_restarts}.")
        self.shares_weights = self.inner.in_process
        self.in_process = False  # what comes back was sampled from other weights than the trainer's
        self.staleness, self.correction, self.max_weight = staleness, correction, max_weight
        self.worker_kind, self.device, self.threads = worker, device, threads
        self.deterministic, self.max_restarts, self.restarts = deterministic, max_restarts, 0
        if correction == "truncated":
            self.loss_correction = OffPolicyCorrection("token", weight_high=max_weight)
        self.batches: list[_Batch] = []  # drawn and not yet returned, oldest first
        self.step_size = 0  # groups of a step
        self.worker: Worker | None = None
        self._blueprint = copy.deepcopy(self.inner)  # of the worker's sampler, before this one is set up
        self._aside: list[_Batch] = []  # requests outside of training that the worker has
        self._weights: dict[int, Weights] = {}  # in case a deterministic worker has to start again
        self._number = 0
        self._meter, self._waited = StalenessMeter(), 0.0

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        if self.correction == "truncated" and module.old_logprobs == "sampler":
            raise ValueError(
                "AsyncSampler samples from earlier weights, but old_logprobs='sampler' takes its log-probabilities for "
                "the policy's own: set old_logprobs='auto', or correction='behaviour' of the sampler."
            )
        for term in module.loss_terms:
            if self.correction == "truncated" and getattr(term, "correction", self) is None:
                raise ValueError(
                    f"AsyncSampler samples from earlier weights, and the loss term {term.name!r} of "
                    f"{type(module).__name__} treats them as the current ones: set `correction` of the method, or "
                    "correction='behaviour' of the sampler."
                )

    # The worker ----------------------------------------------------------------------------------------------------

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Take the policy; the worker starts with the first request."""
        self.model, self.tokenizer = model, tokenizer
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "AsyncSampler copies whole weights and this policy's are sharded: use a strategy without sharding "
                "(ddp), or a sampler whose engine has weights of its own."
            )
        if self.shares_weights:
            self.inner.setup(model, tokenizer)

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """Send the weights to the worker, behind what it has to do (in front of it, unless deterministic)."""
        self.policy_version = version
        if self.shares_weights:
            self.inner.sync(model, version)
        if self.worker is not None:
            self._tell(self._remember(model))

    def _remember(self, model: torch.nn.Module) -> Weights:
        """The current weights, kept with the older ones that open batches may need again."""
        weights = Weights.of(model, self.policy_version, "cpu" if self.worker_kind == "process" else None)
        if self.deterministic:
            needed = {b.version for b in self._open()}
            kept = {version: w for version, w in self._weights.items() if version in needed}
            self._weights = kept | {weights.version: weights}
        return weights

    def _open(self) -> list[_Batch]:
        """What the worker has still to do, in its order."""
        return [b for b in (*self.batches, *self._aside) if b.rollouts is None]

    def _start(self) -> Worker:
        inner = copy.deepcopy(self._blueprint)
        settings = WorkerSettings(inner, self.tokenizer, not self.deterministic, self.device, self.threads)
        kind = ProcessWorker if self.worker_kind == "process" else ThreadWorker
        return kind(self.model, self.policy_version, settings)

    def _tell(self, command: Weights | Job | Cancel) -> None:
        """Give the worker a command; if it is dead, a new one gets everything that is open instead."""
        if self.worker is None:
            self.worker = self._start()
            self._remember(self.model)
        try:
            self.worker.put(command)
        except WorkerDied as death:
            self._restart(death)

    def _restart(self, death: WorkerDied) -> None:
        """Start a new worker and submit again what the dead one had not returned, with the weights it was due."""
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise RuntimeError(
                f"The rollout worker died {self.restarts} times in this run, more than max_restarts="
                f"{self.max_restarts}; at last {death}. Exit status -9 is often the system running out of memory. A "
                "script that trains must do so under `if __name__ == '__main__':`, because the worker imports it."
            ) from death
        _log.warning("AsyncSampler: %s; a new one takes over its %d requests.", death, len(self._open()))
        assert self.worker is not None
        self.worker.close()
        self.worker, version = self._start(), self.policy_version
        try:
            for batch in self._open():
                if self.deterministic and batch.version != version:
                    version = batch.version
                    self.worker.put(self._weights[version])
                self.worker.put(batch.job())
            if version != self.policy_version:
                self.worker.put(self._weights[self.policy_version])
        except WorkerDied as again:
            self._restart(again)

    def _submit(self, request: RolloutRequest) -> _Batch:
        """A batch that the worker has been asked for; the caller puts it where `_open` finds it."""
        self._number += 1
        autocast = autocast_dtype(_device(self.model))
        plain = replace(request, should_stop=None, score=None, wanted=None)
        return _Batch(self._number, plain, self.policy_version, autocast)

    def _finished(self, batch: _Batch, should_stop: Callable[[Progress], bool] | None) -> Rollouts | None:
        """Wait for a batch; None if the run is to stop first.

        Raises:
            RuntimeError: sampling failed, or the worker died too often.
        """
        began = time.perf_counter()
        while batch.rollouts is None:
            if should_stop is not None and should_stop(_Waiting.on(batch.request)):
                return None
            assert self.worker is not None
            try:
                result = self.worker.result(_PATIENCE)
            except WorkerDied as death:
                self._restart(death)
                continue
            if result is not None:
                self._take(result)
        self._waited += time.perf_counter() - began
        return batch.rollouts

    def _take(self, result: Result) -> None:
        if result.error:
            raise RuntimeError(f"Sampling failed in the worker of AsyncSampler:\n{result.error}")
        for batch in self._open():
            if batch.number == result.number:
                batch.rollouts = result.rollouts

    # A step --------------------------------------------------------------------------------------------------------

    def prompts_to_draw(self, wanted: int) -> int:
        """As many as this step and those ahead need, less what was drawn before."""
        ahead = self.staleness * max(self.step_size, wanted)
        return max(0, wanted + ahead - sum(b.groups for b in self.batches))

    def generate(self, request: RolloutRequest) -> Rollouts:
        """Hand the request's prompts to the worker; return the oldest ``request.wanted`` groups."""
        if request.wanted is None:
            return self.inner.sample(request) if self.shares_weights else self._outside_of_training(request)
        self.step_size = max(self.step_size, request.wanted)
        for part in prompts_in_parts(request, max(1, request.wanted)):
            self.batches.append(self._submit(part))
            self._tell(self.batches[-1].job())
        parts: list[Rollouts] = []
        missing = request.wanted
        while missing and self.batches:
            rollouts = self._finished(self.batches[0], request.should_stop)
            if rollouts is None:
                return unstarted(self.batches[0].request)  # nobody will use it
            del self.batches[0]
            first = torch.arange(len(rollouts.prompts)) < missing
            parts.append(rollouts.select_groups(first))
            missing -= len(parts[-1].prompts)
            if not bool(first.all()):
                self.batches.insert(0, _Batch.done(rollouts.select_groups(~first)))
        return self._delivered(Rollouts.cat(parts).trim() if parts else unstarted(replace(request, wanted=None)))

    def _delivered(self, rollouts: Rollouts) -> Rollouts:
        self._meter.add(rollouts, self.policy_version)
        if self.correction == "behaviour":
            rollouts.logprobs["old"] = rollouts.logprobs["sampler"].clone()
        return rollouts

    def _outside_of_training(self, request: RolloutRequest) -> Rollouts:
        """Let the worker do a request that has no place in the order of steps."""
        batch = self._submit(request)
        self._aside.append(batch)
        self._tell(batch.job())
        try:
            rollouts = self._finished(batch, request.should_stop)
            return unstarted(request) if rollouts is None else rollouts
        finally:
            self._aside.remove(batch)

    # State ---------------------------------------------------------------------------------------------------------

    def boundary(self) -> Any:
        return tuple(self.batches), self.step_size

    def return_to(self, boundary: Any) -> None:
        batches, self.step_size = boundary
        self.batches = list(batches)
        self._pending.clear()

    def on_rewind(self, model: torch.nn.Module) -> None:
        """Drop what was sampled ahead: it belongs to the abandoned future."""
        self.batches.clear()
        self._pending.clear()
        if self.worker is not None:
            self._tell(Cancel())
        if self.shares_weights:
            self.inner.on_rewind(model)

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Age of the tokens in policy versions, seconds that the trainer waited, batches ahead, restarts so far."""
        numbers = self._meter.summary() | {
            "wait_seconds": self._waited,
            "batches_ahead": float(len(self.batches)),
            "worker_restarts": float(self.restarts),
        }
        self._meter, self._waited = StalenessMeter(), 0.0
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """The batches ahead, finished first."""
        for batch in list(self.batches):
            self._finished(batch, None)
        done = [pack_rollouts(b.rollouts) for b in self.batches if b.rollouts is not None]
        return {"batches": done, "step_size": self.step_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = [_Batch.done(unpack_rollouts(packed)) for packed in state["batches"]]
        self.step_size = state["step_size"]

    def describe(self) -> str:
        how = "from the weights of its step" if self.deterministic else "from the newest weights"
        return f"AsyncSampler({self.inner.describe()} in a {self.worker_kind}, {self.staleness} steps ahead, {how})"

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        self._weights.clear()
        if self.shares_weights:
            self.inner.close()


@dataclass(eq=False)
class _Batch:
    """Completions of some groups: asked for or there."""

    number: int
    request: RolloutRequest
    version: int  # of the weights when it was drawn
    autocast: torch.dtype | None = None
    rollouts: Rollouts | None = None

    @classmethod
    def done(cls, rollouts: Rollouts) -> _Batch:
        request = RolloutRequest(rollouts.prompts, rollouts.group, rollouts.row["sample"], Sampling(), seed=0)
        return cls(0, request, 0, rollouts=rollouts)

    @property
    def groups(self) -> int:
        return len(self.request.prompts)

    def job(self) -> Job:
        return Job(self.number, self.request, self.autocast)


@dataclass
class _Waiting:
    """The progress of a batch that a worker has: nothing is known of it."""

    step: int
    finished: Tensor
    lengths: Tensor

    @classmethod
    def on(cls, request: RolloutRequest) -> _Waiting:
        return cls(0, torch.zeros(len(request), dtype=torch.bool), torch.zeros(len(request), dtype=torch.long))


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
