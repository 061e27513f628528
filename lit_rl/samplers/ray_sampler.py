# SPDX-License-Identifier: Apache-2.0
"""Rollouts on many machines: the work of a request divided among Ray actors."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Interrupt, Progress, RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.decoder import autocast_dtype
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.ray_workers import Placement, RayPool, RayWorker, UnitResult
from lit_rl.samplers.work_units import Clock, LengthEstimate, as_of, assemble, deal, divide, part_of
from lit_rl.samplers.workers import Weights, WorkerSettings
from lit_rl.samplers.wrapping import SamplerWrapper, unstarted

_log = logging.getLogger(__name__)
_PATIENCE = 0.1  # seconds between two looks at whether the run is to stop


class RaySampler(SamplerWrapper):
    """Copies of the inner sampler in Ray actors share the work of each request, on one machine or many.

    A request is divided into units of a few groups. They wait in a queue, those expected to be longest first, and each
    worker that is free takes the next, so that no worker waits while another has a queue of its own. A prompt's
    completions are expected to be as long as they were when it was sampled before, else as those of its source, else as
    their budget. Because sampling noise hangs on (seed, draw, sample, position), completions do not depend on the
    number of workers or on which of them made what: they are those of the inner sampler in one process (log-
    probabilities up to rounding).

    After each update the weights that are trained go into Ray's object store once and are loaded by all workers, who
    find them there without a copy for each. They are the current ones for every token, so rollouts are on-policy.

    A request that is to stop at a step (from `PartialSampler`, say) is not queued: all its rows run at once, a share
    in each worker, and what is returned is what one batch of all of them would have been at that step. A worker may be
    some steps ahead of it; these are thrown away.

    A worker that dies, or does not return a unit in time, is replaced by one with the current weights, and its unit is
    sampled again: nothing is lost and nothing counts twice.

    Each rank of a distributed run has its own ``workers``. On one machine the ranks share a single local Ray.

    Args:
        inner: generates, in each worker. Default `HFSampler`.
        workers: number of actors of each rank.
        address: None: what the environment variable ``RAY_ADDRESS`` says, else a Ray of its own on this machine.
            ``"auto"``: the cluster that this machine belongs to. Anything else goes to ``ray.init`` as it is.
        num_cpus: CPUs that Ray reserves for a worker; also its torch threads (rounded down, at least 1).
        num_gpus: GPUs of a worker; a part of one lets workers share it.
        resources: custom resources of a worker, by name.
        strategy: how Ray places the workers: ``"PACK"`` on few machines, ``"SPREAD"`` over many; ``"STRICT_PACK"`` and
            ``"STRICT_SPREAD"`` insist.
        units_per_worker: into how many units the even share of a worker is divided. More balance better, fewer decode
            larger batches.
        timeout: seconds after which a worker that has not returned a unit is taken for dead; None: never.
        start_timeout: seconds that the cluster has to make room for the workers, and workers to load the policy.
        max_restarts: how often workers may be replaced in a run.
        device: where a worker's copy of the policy lives; None: on its GPU if it has one, else on the CPU.

    Raises:
        ValueError: an argument is out of range, or ``inner`` carries work over from step to step or selects.
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(
        self,
        inner: RolloutSampler | None = None,
        workers: int = 2,
        address: str | None = None,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        resources: dict[str, float] | None = None,
        strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK",
        units_per_worker: int = 2,
        timeout: float | None = None,
        start_timeout: float = 300.0,
        max_restarts: int = 3,
        device: str | None = None,
    ) -> None:
        super().__init__(inner or HFSampler())
        at_least_one = {"workers": workers, "units_per_worker": units_per_worker}
        for name, count in at_least_one.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        positive = {"num_cpus": num_cpus, "timeout": timeout, "start_timeout": start_timeout}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name, value in {"num_gpus": num_gpus, "max_restarts": max_restarts}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if strategy not in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
            raise ValueError(f"strategy must be PACK, SPREAD, STRICT_PACK or STRICT_SPREAD, got {strategy!r}.")
        if find_spec("ray") is None:
            raise ModuleNotFoundError("RaySampler needs Ray, which is not installed: pip install 'lit-rl[ray]'.")
        self.in_process = False
        self.units_per_worker, self.timeout, self.device = units_per_worker, timeout, device
        self.max_restarts, self.restarts = max_restarts, 0
        self.placement = Placement(workers, address, num_cpus, num_gpus, resources or {}, strategy, start_timeout)
        self.pool: RayPool | None = None
        self.estimate = LengthEstimate()
        self._blueprint = copy.deepcopy(self.inner)  # of the workers' samplers; this one is never set up
        self._number = 0
        self._numbers = _Numbers()

    # Workers -------------------------------------------------------------------------------------------------------

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Join or start Ray; the workers start with the first `sync`.

        Raises:
            ValueError: the weights are sharded, or this machine is too small for what the workers ask for.
        """
        self.model, self.tokenizer = model, tokenizer
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "RaySampler sends whole weights to its workers and this policy's are sharded: use a strategy without "
                "sharding (ddp), or a sampler that shares the trainer's weights."
            )
        self.pool = RayPool(self.placement, self._policy)
        self.pool.connect()

    def check_setup(self, module: Any) -> None:
        """What the inner sampler could not share with a trainer is no matter here: it has a process of its own."""

    def _policy(self) -> tuple[Any, int, WorkerSettings]:
        return self.model, self.policy_version, WorkerSettings(self._blueprint, self.tokenizer, True, self.device)

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """Send the weights to all workers; start them if this is the first time."""
        if self.pool is None:
            raise RuntimeError("RaySampler has no model yet: call setup(model, tokenizer) before sync().")
        self.model, self.policy_version = model, version
        if self.pool.workers:
            self.pool.sync(Weights.of(model, version, "cpu"))
        else:
            self.pool.start()

    def replace_worker(self, worker: RayWorker, reason: object) -> None:
        """Start another in the place of a worker that failed.

        Raises:
            RuntimeError: that has happened too often.
        """
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise RuntimeError(
                f"Rollout workers failed {self.restarts} times in this run, more than max_restarts="
                f"{self.max_restarts}; at last worker {worker.index}: {reason}"
            )
        _log.warning("RaySampler: worker %d is replaced and its unit sampled again: %s", worker.index, reason)
        assert self.pool is not None
        self.pool.replace(worker)

    # A request -----------------------------------------------------------------------------------------------------

    def generate(self, request: RolloutRequest) -> Rollouts:
        """The completions of a request, from all workers."""
        if self.pool is None or not self.pool.workers:
            raise RuntimeError("RaySampler has no workers yet: call setup(model, tokenizer) and sync() first.")
        expected, n = self.estimate.remaining(request), self.placement.workers
        stop, clock = request.should_stop, None
        units = divide(request.group.cpu(), expected, n * self.units_per_worker)
        if stop is not None and not isinstance(stop, Interrupt):
            units = deal(units, expected, n)
            before = torch.zeros(len(request), dtype=torch.long)
            clock = Clock(units, before if request.prefix is None else request.prefix.lengths.cpu())
        autocast = autocast_dtype(next(self.model.parameters()).device)
        parts = [part_of(request, rows) for rows in units]
        work = _Work(self, [_Unit(self._number + i, i, part, autocast) for i, part in enumerate(parts)], clock)
        self._number += len(units)
        began = time.perf_counter()
        if not work.finish(stop):
            return unstarted(replace(request, wanted=None))  # the run is being stopped; nobody will use it
        results = [work.results[i] for i in range(len(units))]
        if request.wanted is not None:
            self._numbers.add(results, (time.perf_counter() - began) * n)
        rollouts = assemble(request, units, [r.rollouts for r in results])
        self.estimate.update(rollouts)
        return rollouts

    def next_token_logprobs(self, contexts: Sequence[Tensor], sampling: Sampling) -> Tensor:
        return RolloutSampler.next_token_logprobs(self, contexts, sampling)  # workers have the engines, this has none

    # State ---------------------------------------------------------------------------------------------------------

    def on_rewind(self, model: torch.nn.Module) -> None:
        self._pending.clear()

    def boundary(self) -> Any:
        return self.estimate.copy()

    def return_to(self, boundary: Any) -> None:
        self.estimate = boundary.copy()
        self._pending.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        yield  # the accelerators of the workers are their own

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Units, replaced workers so far, share of the workers' time in which they had nothing to do; with the inner
        sampler's own numbers, each the mean over units."""
        numbers, self._numbers = self._numbers.summary(), _Numbers()
        return numbers | {"worker_restarts": float(self.restarts)}

    def state_dict(self) -> dict[str, Any]:
        """The expected lengths: they decide which rows share a batch, and so how log-probabilities are rounded."""
        return {"lengths": self.estimate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimate.load_state_dict(state["lengths"])

    def describe(self) -> str:
        p = self.placement
        each = ", ".join(f"{amount:g} {name}" for name, amount in p.bundle().items())
        return f"RaySampler({self.inner.describe()}, {p.workers} workers of {each})"

    def close(self) -> None:
        """End the workers, and Ray if it was started by this sampler."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None


@dataclass
class _Unit:
    """Some rows of a request."""

    number: int  # unique in the life of a sampler
    index: int  # in the request
    request: RolloutRequest
    autocast: torch.dtype | None


@dataclass(eq=False)
class _Running:
    unit: _Unit
    worker: RayWorker
    result: Any  # reference
    steps: Any = None  # reference to the next states, if it is watched
    since: float = 0.0
    up: bool = False


class _Work:
    """The units of one request on their way through the workers.

    Args:
        sampler: whose workers.
        units: what is to be done, the longest first.
        clock: watches the steps of all units, which then run at once, one in each worker.
    """

    def __init__(self, sampler: RaySampler, units: list[_Unit], clock: Clock | None) -> None:
        assert sampler.pool is not None
        self.sampler, self.pool, self.clock = sampler, sampler.pool, clock
        self.waiting, self.total = deque(units), len(units)
        self.running: list[_Running] = []
        self.results: dict[int, UnitResult] = {}
        self.stopped = False  # at the clock's step

    def finish(self, should_stop: Callable[[Progress], bool] | None) -> bool:
        """Until everything is there; False if the run is to stop before that."""
        try:
            while len(self.results) < self.total:
                self._hand_out()
                self._wait()
                if self.clock is None:
                    if isinstance(should_stop, Interrupt) and should_stop.requested():
                        self._abandon()
                        return False
                elif should_stop is not None and not self.stopped and self.clock.advance(should_stop):
                    self.stopped = True
                    for running in self.running:
                        self._end(running, self.clock.step)
        except BaseException:
            self._abandon()
            raise
        if self.clock is not None and self.stopped:
            for i, (finished, lengths) in enumerate(self.clock.states):
                self.results[i] = self.results[i]._replace(rollouts=as_of(self.results[i].rollouts, finished, lengths))
        return True

    def _hand_out(self) -> None:
        busy = {running.worker.index for running in self.running}
        for worker in self.pool.workers:
            if self.waiting and worker.index not in busy:
                unit = self.waiting.popleft()
                watched = self.clock is not None
                result = worker.actor.sample.remote(unit.number, unit.request, unit.autocast, watched)
                self.running.append(_Running(unit, worker, result, since=time.monotonic()))
                if self.stopped and self.clock is not None:
                    self._end(self.running[-1], self.clock.step)

    def _wait(self) -> None:
        """Take what comes back within a moment, and replace workers from which nothing will."""
        import ray

        for running in self.running:
            if self.clock is not None and running.steps is None and not self.stopped:
                seen = self.clock.received[running.unit.index]
                control = running.worker.actor.steps.options(concurrency_group="control")
                running.steps = control.remote(running.unit.number, seen, _PATIENCE)
        awaited = [ref for r in self.running for ref in (r.result, r.steps) if ref is not None]
        ready, _ = ray.wait(awaited, num_returns=1, timeout=_PATIENCE, fetch_local=False)
        ready = set(ready)
        for running in list(self.running):
            if running.steps in ready:
                self._take_steps(running)
            if running.result in ready:
                self._take_result(running)
            elif self._overdue(running):
                self._lost(running, f"it did not return {len(running.unit.request)} completions in time")

    def _take_steps(self, running: _Running) -> None:
        import ray

        assert self.clock is not None
        seen, ref = self.clock.received[running.unit.index], running.steps
        running.steps = None
        with suppress(ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):  # the result says so too
            self.clock.add(running.unit.index, seen, ray.get(ref))

    def _take_result(self, running: _Running) -> None:
        import ray

        try:
            result: UnitResult = ray.get(running.result)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as death:
            self._lost(running, death)
            return
        self.running.remove(running)
        self.results[running.unit.index] = result
        if self.clock is not None:
            self.clock.add(running.unit.index, result.seen, result.steps)
            self.clock.end(running.unit.index, result.rollouts.lengths)

    def _overdue(self, running: _Running) -> bool:
        if not running.up and running.worker.pid() is not None:
            running.up, running.since = True, time.monotonic()
        limit = self.sampler.timeout if running.up else self.sampler.placement.start_timeout
        return limit is not None and time.monotonic() - running.since > limit

    def _lost(self, running: _Running, reason: object) -> None:
        self.running.remove(running)
        self.waiting.appendleft(running.unit)
        self.sampler.replace_worker(running.worker, reason)

    def _end(self, running: _Running, step: int) -> None:
        running.worker.actor.end.options(concurrency_group="control").remote(running.unit.number, step)

    def _abandon(self) -> None:
        for running in self.running:
            self._end(running, 0)


class _Numbers:
    """What happened in a step, over all its rounds."""

    def __init__(self) -> None:
        self.units, self.busy, self.present = 0, 0.0, 0.0
        self.inner: Counter[str] = Counter()

    def add(self, results: Sequence[UnitResult], present: float) -> None:
        """Results of a request, and the seconds that all workers were there for it."""
        self.units += len(results)
        self.busy += sum(r.seconds for r in results)
        self.present += present
        for result in results:
            self.inner.update(result.numbers)

    def summary(self) -> dict[str, float]:
        inner = {name: total / self.units for name, total in self.inner.items()}
        idle = max(0.0, 1 - self.busy / self.present) if self.present else 0.0
        return inner | {"units": float(self.units), "idle_ratio": idle}
