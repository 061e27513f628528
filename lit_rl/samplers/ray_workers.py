# SPDX-License-Identifier: Apache-2.0
"""Rollout workers as Ray actors: what runs in them, how they start and where, and how one is replaced.

Ray is imported when a pool connects. Weights travel as arrays that Ray keeps once on each machine.
"""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from lit_rl import distributed as ranks
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Interrupt, Progress, RolloutRequest
from lit_rl.samplers.work_units import State
from lit_rl.samplers.workers import Engine, Weights, WorkerSettings

_log = logging.getLogger(__name__)
_AHEAD = 16  # decode steps that a watched worker may be ahead of what the trainer has looked at
_SOON = 10.0  # seconds in which a cluster that has room makes it
_PARTING = 5.0  # seconds that workers have to leave in good order


# Weights as arrays ---------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """An object, pickled, with its tensors beside it as arrays of bytes: Ray shares these on a machine."""

    data: bytes
    arrays: list[Any]


def pack(value: Any) -> Packed:
    """Pickle an object whose tensors travel as arrays, each once, on the CPU. Classes of scripts travel by value."""
    from ray import cloudpickle

    tensors: dict[int, tuple[torch.Tensor, int]] = {}  # keeps the tensors, so that no id is used twice
    arrays: list[Any] = []

    class Pickler(cloudpickle.CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout != torch.strided:
                return None
            if id(obj) not in tensors:
                tensors[id(obj)] = obj, len(arrays)
                flat = obj.detach().cpu().contiguous().flatten()
                arrays.append((flat.view(torch.uint8) if len(flat) else torch.zeros(0, dtype=torch.uint8)).numpy())
            kind = type(obj) is torch.nn.Parameter
            return tensors[id(obj)][1], obj.dtype, tuple(obj.shape), kind, obj.requires_grad

    file = io.BytesIO()
    Pickler(file).dump(value)
    return Packed(file.getvalue(), arrays)


def unpack(packed: Packed, copy: bool = True) -> Any:
    """The object that was packed; without ``copy`` its tensors are read-only views."""
    made: dict[int, torch.Tensor] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> torch.Tensor:
            index, dtype, shape, parameter, requires_grad = pid
            if index not in made:
                array = packed.arrays[index]
                flat = torch.as_tensor(array.copy() if copy else array)
                tensor = flat.view(dtype).view(shape) if len(flat) else torch.empty(shape, dtype=dtype)
                made[index] = torch.nn.Parameter(tensor, requires_grad) if parameter else tensor
            return made[index]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return Unpickler(io.BytesIO(packed.data)).load()


# In the worker -------------------------------------------------------------------------------------------------------


class UnitResult(NamedTuple):
    """What a worker made of a unit.

    Args:
        rollouts: completions.
        seconds: that it worked on them.
        numbers: of the inner sampler.
        seen: decode steps whose states the trainer had asked for before, if it watches.
        steps: states after those that followed.
    """

    rollouts: Rollouts
    seconds: float
    numbers: dict[str, float]
    seen: int
    steps: list[State]


class RolloutActor:
    """The inner sampler on a copy of the policy. `sample` and `load` come in turn; the others answer in between."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number, self._steps = -1, list[State]()  # of the unit in work
        self._allowed = 0  # steps that the trainer has looked at
        self._ends: dict[int, int] = {}  # unit -> step at which it ends
        self._failure: Exception | None = None

    def start(self, policy: Packed, threads: int) -> int:
        """Take a packed ``(model, version, WorkerSettings)``; returns the process id."""
        torch.set_num_threads(threads)
        try:
            model, version, settings = unpack(policy)
            device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.engine = Engine(model.requires_grad_(False).eval().to(device), version, settings, lambda: False)
            self._awake = self.engine.sampler.active()  # for good: the memory is this worker's alone
            self._awake.__enter__()
        except Exception as error:
            self._failure = error
            raise
        return os.getpid()

    def load(self, weights: Packed) -> None:
        """Take new weights. A failure shows with the next unit."""
        try:
            self.engine.load(unpack(weights, copy=False))
        except Exception as error:
            self._failure = error

    def sample(self, number: int, request: RolloutRequest, autocast: torch.dtype | None, watched: bool) -> UnitResult:
        """The completions of a unit, on the CPU; ``watched`` keeps the state after each step for `steps`."""
        if self._failure is not None:
            raise self._failure
        began, sampler = time.perf_counter(), self.engine.sampler
        with self._changed:
            self._number, self._steps, self._allowed = number, [], 0
        stop = self._watch if watched else Interrupt(lambda: number in self._ends)
        kind = next(self.engine.model.parameters()).device.type
        with torch.autocast(kind, autocast, enabled=autocast is not None):
            rollouts = sampler.sample(replace(request, should_stop=stop)).to("cpu")
        numbers = sampler.metrics(rollouts) if request.wanted is not None else {}
        with self._changed:
            self._ends.pop(number, None)
            seen = self._allowed
            return UnitResult(rollouts, time.perf_counter() - began, numbers, seen, self._steps[seen:])

    def _watch(self, progress: Progress) -> bool:
        with self._changed:
            self._steps.append((progress.finished.clone(), progress.lengths.clone()))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._number in self._ends or len(self._steps) < self._allowed + _AHEAD)
            return len(self._steps) >= self._ends.get(self._number, math.inf)

    def steps(self, number: int, seen: int, patience: float) -> list[State]:
        """States of a unit after the steps that follow the first ``seen``; waits for one, but not for long."""
        with self._changed:
            if self._number == number:
                self._allowed = max(self._allowed, seen)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._number == number and len(self._steps) > seen, patience)
            return self._steps[seen:] if self._number == number else []

    def end(self, number: int, step: int) -> None:
        """Let a unit end after its first ``step`` steps, or as soon as possible."""
        with self._changed:
            if number >= self._number:
                self._ends[number] = step
            self._changed.notify_all()

    def close(self) -> None:
        """Release what the inner sampler holds."""
        self._awake.__exit__(None, None, None)
        self.engine.sampler.close()


# In the trainer ------------------------------------------------------------------------------------------------------


@dataclass
class Placement:
    """Where workers run and what each of them occupies; see `RaySampler`."""

    workers: int
    address: str | None
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
    start_timeout: float

    def bundle(self) -> dict[str, float]:
        """The resources of one worker."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount}


@dataclass(eq=False)
class RayWorker:
    """An actor. ``started`` is the reference to its process id, there once it is up."""

    index: int
    actor: Any
    started: Any
    since: float = field(default_factory=time.monotonic)

    def pid(self) -> int | None:
        """Its process, None until it is up (or if it died before)."""
        import ray

        ready, _ = ray.wait([self.started], timeout=0)
        try:
            return ray.get(self.started) if ready else None
        except ray.exceptions.RayActorError:
            return None


class RayPool:
    """Workers of one rank.

    Args:
        placement: how many, where, with what.
        policy: makes what a worker starts from: ``(model, version, WorkerSettings)``.
    """

    def __init__(self, placement: Placement, policy: Callable[[], tuple[Any, int, WorkerSettings]]) -> None:
        self.placement, self.policy = placement, policy
        self.workers: list[RayWorker] = []
        self.weights: Any = None  # reference to the newest ones, if they changed since the workers started
        self.owns_ray = False
        self._group: Any = None

    def connect(self) -> None:
        """Join or start Ray: a collective call. ``ValueError`` if what was started here can never be enough."""
        with _untouched_process():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray

            if ray.is_initialized():
                return
            address = self.placement.address or os.environ.get("RAY_ADDRESS")
            if address is not None:
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                self._start_local(ray)

    def _start_local(self, ray: Any) -> None:
        """Rank 0 starts Ray for all ranks of this machine. It has as many CPUs as workers ask for, or the machine."""
        each, n, ranks_here = self.placement.bundle(), self.placement.workers, ranks.world_size()
        if len(set(ranks.gather_objects(socket.gethostname()))) > 1:
            raise ValueError(
                "RaySampler can start a Ray of its own on one machine only, and the ranks of this run are on several: "
                "run `ray start` on each (docs/samplers.md says how) and set address='auto'."
            )
        address = None
        if ranks.rank() == 0:
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 is for machines that do other work
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(each.get("CPU", 0) * n * ranks_here)),
                resources={name: amount * n * ranks_here for name, amount in self.placement.resources.items()},
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
            self.owns_ray = True
            address = ray.get_runtime_context().gcs_address
        address = ranks.broadcast_object(address)
        if ranks.rank() != 0:
            ray.init(address=address, logging_level=logging.WARNING)
        gpus, wanted = ray.cluster_resources().get("GPU", 0), each.get("GPU", 0) * n * ranks_here
        if wanted > gpus:
            self.close()
            raise ValueError(
                f"The workers of RaySampler need {wanted:g} GPUs and this machine has {gpus:g}: lower workers or "
                "num_gpus, or join a cluster with address='auto'."
            )

    def start(self) -> None:
        """Start the workers and wait until they are up.

        Raises:
            RuntimeError: the cluster has no room for them in time, or a worker cannot be set up.
        """
        import ray

        p = self.placement
        self._group = ray.util.placement_group([p.bundle()] * p.workers, strategy=p.strategy)
        if not self._group.wait(min(p.start_timeout, _SOON)):
            _log.warning("RaySampler waits for room for %d workers of %s each.", p.workers, p.bundle())
        if not self._group.wait(p.start_timeout):
            has = {k: v for k, v in ray.cluster_resources().items() if k in p.bundle()}
            raise RuntimeError(
                f"Ray found no room for {p.workers} workers of {p.bundle()} each ({p.strategy}) within start_timeout="
                f"{p.start_timeout:g} s; the whole cluster has {has}. Lower workers, or add machines with `ray start`."
            )
        policy = ray.put(pack(self.policy()))
        self.workers = [self._launch(i, policy) for i in range(p.workers)]
        try:
            ray.get([w.started for w in self.workers], timeout=p.start_timeout)
        except ray.exceptions.GetTimeoutError as late:
            raise RuntimeError(
                f"The rollout workers did not start within start_timeout={p.start_timeout:g} s; raise it if loading "
                "the policy takes longer."
            ) from late

    def _launch(self, index: int, policy: Any) -> RayWorker:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        p = self.placement
        actor = (
            ray.remote(concurrency_groups={"control": 4}, max_restarts=0)(RolloutActor)
            .options(
                num_cpus=p.num_cpus,
                num_gpus=p.num_gpus,
                resources=p.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            )
            .remote()
        )
        started = actor.start.remote(policy, max(1, int(p.num_cpus)))
        if self.weights is not None:
            actor.load.remote(self.weights)
        return RayWorker(index, actor, started)

    def sync(self, weights: Weights) -> None:
        """Put the weights where every worker finds them, once; they load them before anything else they are asked."""
        import ray

        self.weights = ray.put(pack(weights))
        for worker in self.workers:
            worker.actor.load.remote(self.weights)

    def replace(self, worker: RayWorker) -> RayWorker:
        """Start another worker with the current weights in the place of one, which is killed if it still runs."""
        import ray

        with suppress(Exception):
            ray.kill(worker.actor)
        self.workers[worker.index] = self._launch(worker.index, ray.put(pack(self.policy())))
        return self.workers[worker.index]

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        import ray

        with suppress(Exception):  # whatever is gone already need not be closed
            ray.wait([w.actor.close.remote() for w in self.workers], num_returns=len(self.workers), timeout=_PARTING)
        for worker in self.workers:
            with suppress(Exception):
                ray.kill(worker.actor)
        if self._group is not None:
            with suppress(Exception):
                ray.util.remove_placement_group(self._group)
        self.workers, self.weights, self._group = [], None, None
        if self.owns_ray:
            ray.shutdown()
            self.owns_ray = False


@contextmanager
def _untouched_process() -> Iterator[None]:
    """Take back what Ray does to a process that connects: its handler of SIGTERM and its hook for exceptions.

    A run ends on SIGTERM with a checkpoint (`RolloutCheckpoint`), not at once.
    """
    hook, main = sys.excepthook, threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        sys.excepthook = hook
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
