# SPDX-License-Identifier: Apache-2.0
"""A sampler that works beside the trainer, in a thread or a process, on its own copy of the policy.

Commands go in, results come out. Weights and jobs are in one line, so that a job is sampled from the weights that were
sent before it; with ``newest_first`` the newest weights overtake the jobs that wait.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.policies.frozen import copy_of
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Interrupt, RolloutRequest, RolloutSampler


class Weights(NamedTuple):
    """Weights that the policy trains, by parameter name, and their version."""

    version: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, version: int, device: torch.device | str | None = None) -> Weights:
        """A snapshot of what ``model`` trains; all of it if nothing is."""
        parameters = dict(model.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad} or parameters
        return cls(version, {name: p.detach().to(device or p.device, copy=True) for name, p in trained.items()})


class Job(NamedTuple):
    """A request to sample, with what autocast computes in at the trainer (None: autocast is off)."""

    number: int
    request: RolloutRequest
    autocast: torch.dtype | None = None


class Cancel(NamedTuple):
    """Forget the jobs that have not begun."""


class Result(NamedTuple):
    """What became of a job. ``number`` is None for a failure outside of any job, ``died`` if nothing will follow."""

    number: int | None
    rollouts: Rollouts | None = None
    error: str = ""
    died: bool = False


Command = Weights | Job | Cancel


class WorkerDied(RuntimeError):
    """The worker ended without being asked to. The message says how."""


@dataclass
class WorkerSettings:
    """What a worker needs besides the policy.

    Args:
        sampler: generates; not set up yet.
        tokenizer: the policy's.
        newest_first: let the newest weights overtake waiting jobs.
        device: where the copy of the policy lives; None: where the policy is.
        threads: torch's threads in a worker process; None: torch's own choice.
    """

    sampler: RolloutSampler
    tokenizer: Any
    newest_first: bool
    device: str | None = None
    threads: int | None = None


class Inbox:
    """The line of commands of a worker; `get` blocks until there is one."""

    def __init__(self, newest_first: bool) -> None:
        self._newest_first = newest_first
        self._waiting: deque[Command | None] = deque()
        self._changed = threading.Condition()

    def put(self, command: Command | None) -> None:
        """Add a command; None ends the worker."""
        with self._changed:
            if isinstance(command, Cancel):
                self._waiting = deque(c for c in self._waiting if not isinstance(c, Job))
            else:
                self._waiting.append(command)
                self._changed.notify()

    def get(self) -> Weights | Job | None:
        """The next command."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            weights = [c for c in self._waiting if isinstance(c, Weights)]
            if self._newest_first and weights:
                self._waiting = deque(c for c in self._waiting if not isinstance(c, Weights))
                return weights[-1]
            return self._waiting.popleft()  # type: ignore[return-value]


class Engine:
    """The inner sampler on a copy of the policy, as the worker runs it.

    Args:
        model: the copy.
        version: of its weights.
        settings: what else there is to know.
        stopping: says at every token whether to give up.
    """

    def __init__(self, model: Any, version: int, settings: WorkerSettings, stopping: Callable[[], bool]) -> None:
        self.model, self.sampler, self.stopping = model, settings.sampler, stopping
        self.sampler.setup(model, settings.tokenizer)
        self.sampler.sync(model, version)

    def serve(self, inbox: Inbox, send: Callable[[Result], None]) -> None:
        """Carry out commands until told to end; a failure is a result."""
        while (command := inbox.get()) is not None:
            number = command.number if isinstance(command, Job) else None
            try:
                if isinstance(command, Job):
                    send(Result(number, self.sample(command.request, command.autocast)))
                else:
                    self.load(command)
            except Exception:
                send(Result(number, error=traceback.format_exc()))

    def sample(self, request: RolloutRequest, autocast: torch.dtype | None) -> Rollouts:
        """The completions of a job, on the CPU."""
        kind = next(self.model.parameters()).device.type
        with self.sampler.active(), torch.autocast(kind, autocast, enabled=autocast is not None):
            return self.sampler.sample(replace(request, should_stop=Interrupt(self.stopping))).to("cpu")

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Take new weights."""
        for name, parameter in self.model.named_parameters():
            if name in weights.tensors:
                parameter.copy_(weights.tensors[name])
        self.sampler.sync(self.model, weights.version)


class Worker(ABC):
    """The trainer's side of a worker."""

    def __init__(self) -> None:
        self.results: queue.SimpleQueue[Result] = queue.SimpleQueue()

    @abstractmethod
    def put(self, command: Command) -> None:
        """Hand over a command; does not wait for it. `WorkerDied` if there is nobody to take it."""

    @abstractmethod
    def close(self) -> None:
        """End the worker, in the middle of a job if need be."""

    def result(self, timeout: float) -> Result | None:
        """The next result, None if there is none in time.

        Raises:
            WorkerDied: the worker has ended.
        """
        try:
            result = self.results.get(timeout=timeout)
        except queue.Empty:
            return None
        if result.died:
            raise WorkerDied(result.error)
        return result


class ThreadWorker(Worker):
    """Works in a thread of this process: for engines that leave the interpreter to others while they work.

    Args:
        model: the policy.
        version: of its weights.
        settings: what else there is to know.
    """

    def __init__(self, model: nn.Module, version: int, settings: WorkerSettings) -> None:
        super().__init__()
        self.inbox, self.closing = Inbox(settings.newest_first), threading.Event()
        copy = copy_of(model)
        copy = copy if settings.device is None else copy.to(settings.device)
        engine = Engine(copy, version, settings, self.closing.is_set)
        self.thread = threading.Thread(
            target=engine.serve, args=(self.inbox, self.results.put), daemon=True, name="rollouts"
        )
        self.thread.start()

    def put(self, command: Command) -> None:
        self.inbox.put(command)

    def close(self) -> None:
        self.closing.set()
        self.inbox.put(Cancel())
        self.inbox.put(None)
        self.thread.join()


class ProcessWorker(Worker):
    """Works in a process of its own, started by forkserver (spawn where there is none); it ends with this one.

    Messages are pickled bytes in a pipe, read by a thread at either end, so that neither side ever waits for the other
    to read.

    Args:
        model: the policy.
        version: of its weights.
        settings: what else there is to know.
    """

    def __init__(self, model: nn.Module, version: int, settings: WorkerSettings) -> None:
        super().__init__()
        import multiprocessing

        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_process_main, args=(theirs,), daemon=True, name="rollouts")
        self.process.start()
        theirs.close()
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True, name="rollouts-out").start()
        threading.Thread(target=self._read, daemon=True, name="rollouts-in").start()
        self.outbox.put(pickle.dumps((copy_of(model), version, settings)))

    def put(self, command: Command) -> None:
        if not self.process.is_alive():
            raise WorkerDied(self._obituary())
        self.outbox.put(pickle.dumps(command))

    def close(self) -> None:
        self.outbox.put(None)
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _write(self) -> None:
        while (message := self.outbox.get()) is not None:
            try:
                self.pipe.send_bytes(message)
            except (OSError, ValueError):
                return  # the reader reports that the worker is gone

    def _read(self) -> None:
        try:
            while True:
                self.results.put(pickle.loads(self.pipe.recv_bytes()))
        except (EOFError, OSError, ValueError):
            self.process.join(timeout=5)
            self.results.put(Result(None, error=self._obituary(), died=True))

    def _obituary(self) -> str:
        return f"the worker process ended with exit status {self.process.exitcode}"


def _process_main(pipe: Any) -> None:
    """Body of a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    threading.Thread(target=_follow_parent, daemon=True).start()
    outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    writer = threading.Thread(target=_forward, args=(outbox, pipe), daemon=True)
    writer.start()

    def send(result: Result) -> None:
        outbox.put(pickle.dumps(result))

    try:
        model, version, settings = pickle.loads(pipe.recv_bytes())
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = model if settings.device is None else model.to(settings.device)
        engine = Engine(model, version, settings, lambda: False)
    except Exception:
        send(Result(None, error=traceback.format_exc()))
        outbox.put(b"")
        writer.join()
        return
    inbox = Inbox(settings.newest_first)
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    engine.serve(inbox, send)


def _receive(pipe: Any, inbox: Inbox) -> None:
    try:
        while True:
            inbox.put(pickle.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        inbox.put(None)


def _forward(outbox: queue.SimpleQueue[bytes], pipe: Any) -> None:
    while message := outbox.get():
        pipe.send_bytes(message)


def _follow_parent() -> None:
    """Leave with the training process, even if that was killed."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
