# SPDX-License-Identifier: Apache-2.0
"""Untrusted verifiers in processes of their own: one that hangs, raises or crashes loses its row and nothing else.

Workers start by forkserver (spawn where there is none), ignore Ctrl-C, and import the verifier before its time limit
begins to run. `signal.alarm` is not used: it works only in the main thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of one call

_GIVE_UP_AFTER = 3  # rows in a row whose worker could not even start


class Outcome(NamedTuple):
    """What became of one call: its value, or the kind of failure (``error``, ``timeout``, ``crash``) and why."""

    value: Any
    failure: str | None = None
    detail: str = ""


class VerifierPool:
    """Runs one function in worker processes, each call with its own time limit.

    Processes start with the first call and are replaced when one is killed or dies. A function that cannot be sent to
    another process runs in this one, with a warning that nothing can stop it.

    Args:
        function: what to call; importable, so that a worker finds it.
        timeout: seconds that one call may take before its worker is killed.
        workers: number of processes; by default two, or one on a single core.

    Raises:
        ValueError: ``timeout`` or ``workers`` is not positive.
    """

    def __init__(self, function: Callable[..., Any], timeout: float = 5.0, workers: int | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}.")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}; leave it out for a default.")
        self.function = function
        self.timeout = timeout
        self.workers = workers or min(2, os.cpu_count() or 1)
        self._pool: Any = None
        self._owner = 0  # process that started the pool: a fork inherits the object but not its threads
        self._payload = b""
        reason = _why_not_isolated(function)
        if reason is None:
            self._payload = pickle.dumps(function)
        else:
            warnings.warn(
                f"{_name(function)} runs inside the training process, where it can neither be timed out nor survive a "
                f"crash, because {reason}. Move it to the top level of an importable module.",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def isolated(self) -> bool:
        """Whether calls run in other processes."""
        return bool(self._payload)

    def map(self, calls: Sequence[Call]) -> list[Outcome]:
        """Call the function once for each entry; results in the same order."""
        if not self.isolated:
            return [call_here(self.function, *call) for call in calls]
        outcomes: list[Outcome] = [Outcome(math.nan, "crash", _BROKEN)] * len(calls)
        broken = self._attempt(calls, range(len(calls)), outcomes)
        # A pool breaks if a worker dies before it could say which call it took. One by one, only that call is lost.
        in_a_row = 0
        for i in broken:
            if in_a_row == _GIVE_UP_AFTER:
                break
            in_a_row = in_a_row + 1 if self._attempt(calls, [i], outcomes) else 0
        return outcomes

    def close(self) -> None:
        """Stop the workers; the next call starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None and self._owner == os.getpid():
            pool.stop()
            pool.join()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _attempt(self, calls: Sequence[Call], rows: Sequence[int], outcomes: list[Outcome]) -> list[int]:
        """Run ``rows`` and fill in their outcomes; returns the rows that a broken pool left without one."""
        pool = self._running()
        futures: dict[int, Future[Outcome]] = {}
        try:
            with contextlib.suppress(RuntimeError):  # the pool broke while we were still handing out work
                for i in rows:
                    futures[i] = pool.schedule(_work, args=calls[i], timeout=self.timeout)
            for future in futures.values():
                while not wait([future], timeout=0.5).done and pool.active:
                    pass
            results = {i: self._collect(future) for i, future in futures.items()}
        except BaseException:  # Ctrl-C: nobody waits for the rest any more
            for future in futures.values():
                future.cancel()
            raise
        broken = [i for i in rows if results.get(i) is None]
        for i, outcome in results.items():
            if outcome is not None:
                outcomes[i] = outcome
        if broken:
            self.close()
        return broken

    def _collect(self, future: Future[Outcome]) -> Outcome | None:
        """The outcome of a call, None if the pool broke first."""
        from pebble import ProcessExpired

        if not future.done():
            return None
        try:
            return future.result()
        except BrokenProcessPool:
            return None
        except TimeoutError:
            return Outcome(math.nan, "timeout", f"{_name(self.function)} took longer than {self.timeout:g} s")
        except ProcessExpired as error:
            return Outcome(math.nan, "crash", f"the worker process died with exit status {error.exitcode}")
        except Exception as error:  # arguments or result that cannot be pickled
            return Outcome(math.nan, "error", describe(error))

    def _running(self) -> Any:
        if self._pool is None or self._owner != os.getpid() or not self._pool.active:
            import multiprocessing

            from pebble import ProcessPool

            method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            context: Any = multiprocessing.get_context(method)
            self.close()
            self._owner = os.getpid()
            self._pool = ProcessPool(self.workers, initializer=_start, initargs=(self._payload,), context=context)
        return self._pool


_BROKEN = (
    "the worker process ended before it took any work (a script that trains must do so under "
    "`if __name__ == '__main__':`, and the verifier's module must be importable)"
)


def call_here(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """Call a function in this process; an exception becomes an outcome."""
    try:
        return Outcome(function(*args, **kwargs))
    except Exception as error:
        return Outcome(math.nan, "error", describe(error))


def describe(error: BaseException) -> str:
    """The line that a traceback ends with: the kind of error and its message."""
    return f"{type(error).__name__}: {error}".rstrip(" :")


_function: Callable[..., Any] | None = None  # in a worker: what it was started for
_import_error = ""


def _start(payload: bytes) -> None:
    """First thing in a worker: import the verifier, outside of any call's time limit."""
    global _function, _import_error
    import signal
    import threading

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a hang inside C code never returns to a Python handler
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        _function = pickle.loads(payload)
    except BaseException as error:
        _import_error = f"the worker process cannot import it ({describe(error)})"


def _follow_parent() -> None:
    """Leave with the training process, even if that was killed in the middle of a call."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    if _function is None:
        return Outcome(math.nan, "error", _import_error)
    try:
        outcome = call_here(_function, args, kwargs)
        pickle.dumps(outcome)  # a value that cannot be sent back is the verifier's error, not a crash
        return outcome
    except BaseException as error:  # SystemExit in a verifier must not end the training process
        return Outcome(math.nan, "error", describe(error))


def _why_not_isolated(function: Callable[..., Any]) -> str | None:
    """Why a worker process could not run ``function``; None if it can."""
    main = sys.modules["__main__"]
    main_file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and main_file is not None and not os.path.exists(main_file):
        return "the program was not started from a file, so worker processes cannot start"
    if main_file is None and getattr(function, "__module__", None) == "__main__":
        return "it was defined in an interactive session"
    try:
        pickle.dumps(function)
    except Exception as error:
        return f"it cannot be pickled ({describe(error)})"
    return None


def _name(function: Callable[..., Any]) -> str:
    return getattr(getattr(function, "func", function), "__qualname__", None) or repr(function)  # func: of a partial
