# SPDX-License-Identifier: Apache-2.0
"""Any Python function as a reward: a batch or a row at a time, sync or async, with or without a time limit."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from lit_rl.rewards.base import Reward, RewardExample, RewardInput
from lit_rl.rewards.pool import Call, Outcome, VerifierPool, call_here, describe
from lit_rl.rewards.rows import count_outcomes


class FunctionReward(Reward):
    """Calls a function, given by import path in YAML.

    The function gets the whole batch and returns one value for each completion::

        def brevity(batch: RewardInput) -> list[float]:
            return [1 / (1 + len(text)) for text in batch.completions]

    or, with ``per_row``, one completion and the ``columns`` asked for, and returns its value::

        def exact(completion: str, answer: str) -> float:
            return float(completion.strip() == answer)

    None and NaN mean "not scorable". Coroutine functions are awaited in an event loop of their own, which lives as long
    as the reward; rows of a ``per_row`` coroutine function run concurrently.

    Args:
        function: what to call.
        name: see `Reward`; by default the function's own name.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.
        per_row: call the function for each completion instead of once.
        columns: dataset columns that the function reads; a ``per_row`` function gets them as keyword arguments.
        timeout: seconds that one call may take. A sync function then runs in worker processes and is killed; it must
            be importable. None: no limit, and a sync function runs in the training process.
        workers: number of worker processes.
        concurrency: how many rows of an async ``per_row`` function run at the same time.
        examples: completions with known values, checked by `self_test`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        weight: float = 1.0,
        verifier: bool = False,
        sources: list[str] | None = None,
        per_row: bool = False,
        columns: Sequence[str] = (),
        timeout: float | None = None,
        workers: int | None = None,
        concurrency: int = 64,
        examples: Sequence[RewardExample] = (),
    ) -> None:
        super().__init__(name or _function_name(function), weight, verifier, sources)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout of reward {self.name!r} must be a positive number of seconds, got {timeout}.")
        if concurrency < 1:
            raise ValueError(f"concurrency of reward {self.name!r} must be at least 1, got {concurrency}.")
        self.function = function
        self.per_row = per_row
        self.requires_columns = tuple(columns)
        self.timeout = timeout
        self.workers = workers
        self.concurrency = concurrency
        self.examples = list(examples)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (an object whose __call__ is async)
        )
        self._pool: VerifierPool | None = None
        self._loop: _EventLoop | None = None

    def score(self, batch: RewardInput) -> Any:
        if self.per_row:
            columns = {name: batch.columns[name] for name in self.requires_columns}
            calls: list[Call] = [
                ((completion,), {name: values[i] for name, values in columns.items()})
                for i, completion in enumerate(batch.completions)
            ]
            outcomes = self._run(calls)
            count_outcomes(self, outcomes)
            return [outcome.value for outcome in outcomes]
        outcome = self._run([((batch,), {})])[0]
        if outcome.failure is not None:
            self.count_failure(outcome.failure, len(batch), outcome.detail)
            return [math.nan] * len(batch)
        return outcome.value

    def known_examples(self) -> Sequence[RewardExample]:
        return self.examples

    def close(self) -> None:
        for resource in (self._pool, self._loop):
            if resource is not None:
                resource.close()
        self._pool = self._loop = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_loop": None}

    def _run(self, calls: list[Call]) -> list[Outcome]:
        if self.is_async:
            self._loop = self._loop or _EventLoop()
            return self._loop.run(self._gather(calls))
        if self.timeout is None:
            return [call_here(self.function, *call) for call in calls]
        if self._pool is None:
            self._pool = VerifierPool(self.function, self.timeout, self.workers if self.per_row else 1)
        return self._pool.map(calls)

    async def _gather(self, calls: list[Call]) -> list[Outcome]:
        slots = asyncio.Semaphore(self.concurrency)

        async def one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
            async with slots:
                try:
                    async with asyncio.timeout(self.timeout) as limit:
                        return Outcome(await self.function(*args, **kwargs))
                except Exception as error:
                    if limit.expired():
                        return Outcome(math.nan, "timeout", f"{self.name} took longer than {self.timeout} s")
                    return Outcome(math.nan, "error", describe(error))

        return list(await asyncio.gather(*(one(*call) for call in calls)))


class _EventLoop:
    """An event loop in a thread of its own, so that it also works where one is running already (notebooks)."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="lit-rl-reward-loop", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C
            future.cancel()
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def _function_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else name
