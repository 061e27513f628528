# SPDX-License-Identifier: Apache-2.0
"""Rewards that look at one completion at a time, in this process or isolated in a `VerifierPool`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lit_rl.rewards.base import Reward, RewardInput
from lit_rl.rewards.pool import Call, Outcome, VerifierPool, call_here


class PerRowReward(Reward):
    """A reward defined by its value for one row. Subclasses implement `score_row`.

    Args:
        name: see `Reward`.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.
        isolate: run each row in a worker process that is killed after ``timeout``: for code that may hang or crash.
            The reward must then be picklable; workers see its arguments as they are at the first call.
        timeout: seconds for one row, if isolated.
        workers: number of worker processes, if isolated; by default two, or one on a single core.
    """

    def __init__(
        self,
        name: str | None = None,
        weight: float | None = None,
        verifier: bool | None = None,
        sources: list[str] | None = None,
        *,
        isolate: bool = False,
        timeout: float = 5.0,
        workers: int | None = None,
    ) -> None:
        super().__init__(name, weight, verifier, sources)
        if not timeout > 0:
            raise ValueError(f"timeout of reward {self.name!r} must be a positive number of seconds, got {timeout}.")
        self.isolate = isolate
        self.timeout = timeout
        self.workers = workers
        self._pool: VerifierPool | None = None

    @abstractmethod
    def score_row(self, completion: str, **columns: Any) -> float | None:
        """The value of one completion, None if it is not scorable; ``columns`` are those in `requires_columns`."""

    def row_function(self) -> Callable[..., float | None]:
        """What runs for each row; a worker receives this. By default `score_row` itself."""
        return self.score_row

    def score(self, batch: RewardInput) -> Sequence[float | None]:
        columns = {name: batch.columns[name] for name in self.requires_columns}
        return self.score_calls(
            [
                ((completion,), {name: values[i] for name, values in columns.items()})
                for i, completion in enumerate(batch.completions)
            ]
        )

    def score_calls(self, calls: Sequence[Call]) -> list[float | None]:
        """Run `row_function` for each call; failures are counted and give NaN."""
        if self.isolate:
            if self._pool is None:
                self._pool = VerifierPool(self.row_function(), self.timeout, self.workers)
            outcomes = self._pool.map(calls)
        else:
            function = self.row_function()
            outcomes = [call_here(function, *call) for call in calls]
        count_outcomes(self, outcomes)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def count_outcomes(reward: Reward, outcomes: Sequence[Outcome]) -> None:
    """Tell ``reward`` of every row that failed."""
    for kind in dict.fromkeys(outcome.failure for outcome in outcomes if outcome.failure is not None):
        failed = [outcome for outcome in outcomes if outcome.failure == kind]
        reward.count_failure(kind, len(failed), failed[0].detail)


def only_finished(answers: Sequence[Hashable | None], batch: RewardInput) -> list[Hashable | None]:
    """No answer from a completion that did not end by itself."""
    return [answer if ended else None for answer, ended in zip(answers, batch.finished.tolist())]


def zero_unfinished(values: Sequence[float | None], batch: RewardInput) -> list[float | None]:
    """0 for every completion that did not end by itself; rows without a value stay so."""
    return [
        value if ended or value is None or math.isnan(value) else 0.0
        for value, ended in zip(values, batch.finished.tolist())
    ]
