# SPDX-License-Identifier: Apache-2.0
"""What every reward promises: a batch of completions in, one number a row out, NaN where a row is not scorable."""

from __future__ import annotations

import math
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_rl.rewards.pool import describe

FAILURES = ("error", "timeout", "crash", "not_a_number")  # kinds; each is logged as reward/<name>_<kind>


class RewardSetupError(ValueError):
    """A reward cannot work in this run (missing column, unknown budget). Stops the run instead of giving NaN."""


class RewardSelfTestError(RuntimeError):
    """A reward scores a known right or wrong answer wrongly."""


@dataclass
class RewardInput:
    """Everything that a reward may read, one entry for each of the N completions.

    Attributes:
        prompts: N prompts as the policy saw them.
        completions: N decoded completions up to the end that counts (after any truncation), without special tokens.
        completion_ids: N lists of token ids of the same span.
        lengths: ``[N]`` int, tokens of that span.
        finished: ``[N]`` bool, ended by itself.
        group: ``[N]`` int, rows of one prompt share a number; groups are always whole.
        columns: every other column of the dataset, repeated for each row.
        source: N names of the data source or objective.
        max_length: completion budget in tokens, if there is one.
    """

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    lengths: Tensor
    finished: Tensor
    group: Tensor
    columns: dict[str, list[Any]]
    source: list[str]
    max_length: int | None = None

    def __len__(self) -> int:
        return len(self.completions)

    def __getstate__(self) -> dict[str, Any]:
        # Lists, so that a worker process gets a copy whatever the device, and no shared memory.
        return {**self.__dict__, **{name: getattr(self, name).tolist() for name in ("lengths", "finished", "group")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lengths = torch.tensor(state["lengths"], dtype=torch.long)
        self.finished = torch.tensor(state["finished"], dtype=torch.bool)
        self.group = torch.tensor(state["group"], dtype=torch.long)

    def select(self, index: Sequence[int]) -> RewardInput:
        """The rows at ``index``, in that order."""
        at = torch.as_tensor(list(index), dtype=torch.long, device=self.group.device)
        return RewardInput(
            prompts=[self.prompts[i] for i in index],
            completions=[self.completions[i] for i in index],
            completion_ids=[self.completion_ids[i] for i in index],
            lengths=self.lengths[at],
            finished=self.finished[at],
            group=self.group[at],
            columns={k: [v[i] for i in index] for k, v in self.columns.items()},
            source=[self.source[i] for i in index],
            max_length=self.max_length,
        )


@dataclass
class RewardExample:
    """A completion whose value is known, for `Reward.self_test`.

    Attributes:
        completion: the text to score.
        value: what the reward must give it.
        columns: the row's dataset columns.
        finished: whether the completion ended by itself.
        prompt: the prompt's text.
    """

    completion: str
    value: float
    columns: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    prompt: str = ""


class Reward(ABC):
    """Scores completions. Subclasses implement `score`; the rest of the package calls the reward itself.

    A class attribute of the same name is the default of each argument.

    Args:
        name: key of the reward's term and of its log line ``reward/<name>``; by default the class's own name.
        weight: factor in the weighted sum; 0: the values are logged and count nothing. May be changed while training.
        verifier: whether the values are the verdict ``correct``; at most one reward of a module may say so.
        sources: data sources that the reward applies to (all by default). Rows of other sources get NaN from
            it and are not shown to `score`; the weighted sum leaves it out there.

    Attributes:
        requires_columns: dataset columns that `score` reads.
        failures: rows without a value since the start, by kind: ``error`` (an exception), ``timeout``, ``crash``
            (a worker process died), ``not_a_number`` (infinite, or not a number at all). A reward that answers
            None or NaN says "not scorable", which is no failure.
        last_failure: what the last failure was, in words.
        seconds: wall time of the last call.
    """

    name: str = ""
    weight: float = 1.0
    verifier: bool = False
    sources: list[str] | None = None
    requires_columns: tuple[str, ...] = ()

    def __init__(
        self,
        name: str | None = None,
        weight: float | None = None,
        verifier: bool | None = None,
        sources: list[str] | None = None,
    ) -> None:
        self.name = name or self.name or type(self).__name__
        self.weight = self.weight if weight is None else weight
        self.verifier = self.verifier if verifier is None else verifier
        self.sources = self.sources if sources is None else list(sources)
        if not re.fullmatch(r"[\w-]+", self.name) or self.name in ("mean", "std"):
            raise ValueError(
                f"reward name {self.name!r} must consist of letters, digits, '_' and '-', and must not be 'mean' or "
                "'std', because it becomes part of a log name; pass another `name`."
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of reward {self.name!r} must be a finite number, got {self.weight}.")
        self.failures: Counter[str] = Counter()
        self.last_failure = ""
        self.seconds = 0.0
        self._recent: Counter[str] = Counter()
        self._warned: set[str] = set()

    @abstractmethod
    def score(self, batch: RewardInput) -> Tensor | Sequence[float | None]:
        """N values for the N rows, None or NaN where a row is not scorable."""

    def __call__(self, batch: RewardInput) -> Tensor:
        """Score a batch safely.

        Returns:
            ``[N]`` float32 on the device of ``batch.lengths``. NaN where the reward does not apply, where the row is
            not scorable, or where scoring failed (counted in `failures`, and warned about once for each kind).

        Raises:
            RewardSetupError: a required column is missing.
            ValueError: `score` gave another number of values than there are rows.
        """
        started = time.perf_counter()
        values = torch.full((len(batch),), math.nan)
        rows = self.applies(batch).nonzero()[:, 0]
        if len(rows):
            seen = batch if len(rows) == len(batch) else batch.select(rows.tolist())
            values[rows] = self._score_safely(seen)
        self.seconds = time.perf_counter() - started
        return values.to(batch.lengths.device)

    def applies(self, batch: RewardInput) -> Tensor:
        """``[N]`` bool on the CPU: rows whose source this reward scores."""
        sources = self.sources
        return torch.tensor([sources is None or source in sources for source in batch.source], dtype=torch.bool)

    def answers(self, batch: RewardInput) -> Sequence[Hashable | None] | None:
        """What each completion answers, for majority votes: equal values for equal answers, None for no answer.

        None instead of a list: this reward knows no answers, and there is no maj@k.
        """
        return None

    def known_examples(self) -> Sequence[RewardExample]:
        """Completions whose value is known, for `self_test`; none by default."""
        return ()

    def self_test(self) -> None:
        """Score the known examples; called before training.

        Raises:
            RewardSelfTestError: a value differs from the expected one by more than 1e-6.
        """
        check_examples(self, self.known_examples())

    def close(self) -> None:  # noqa: B027  (few rewards hold anything)
        """Release processes and memory. The reward may be used again afterwards."""

    def pop_failures(self) -> Counter[str]:
        """Failures since this method was last called."""
        recent, self._recent = self._recent, Counter()
        return recent

    def count_failure(self, kind: str, rows: int, detail: str) -> None:
        """Record that ``rows`` rows got no value; warns the first time a ``kind`` is seen."""
        self.failures[kind] += rows
        self._recent[kind] += rows
        self.last_failure = detail
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"Reward {self.name!r} could not score {rows} row(s) ({kind}): {detail}. They are left out of "
                "training as not scorable (NaN). Further failures of this kind are counted without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _score_safely(self, batch: RewardInput) -> Tensor:
        missing = [column for column in self.requires_columns if column not in batch.columns]
        if missing:
            raise RewardSetupError(
                f"Reward {self.name!r} reads the dataset column(s) {missing}, but there are only "
                f"{sorted(batch.columns)}; name the right column in the reward's arguments or keep it in the dataset."
            )
        try:
            raw = self.score(batch)
        except RewardSetupError:
            raise
        except Exception as error:
            self.count_failure("error", len(batch), describe(error))
            return torch.full((len(batch),), math.nan)
        return self._as_values(raw, len(batch))

    def _as_values(self, raw: Any, n: int) -> Tensor:
        """``[N]`` float32 from whatever `score` gave; values that are not finite numbers become NaN and count."""
        shape = tuple(raw.shape) if hasattr(raw, "shape") else _sequence_shape(raw)
        if shape != (n,):
            raise ValueError(
                f"Reward {self.name!r} must return one value for each completion: expected shape ({n},), received "
                f"{shape if shape is not None else type(raw).__name__}."
            )
        entries = raw.tolist() if hasattr(raw, "tolist") else list(raw)
        values = torch.tensor([_as_float(entry) for entry in entries], dtype=torch.float32)
        bad = values.isinf()
        if bad.any():
            first = int(bad.nonzero()[0])
            self.count_failure("not_a_number", int(bad.sum()), f"row {first} is {entries[first]!r}")
        return values.masked_fill(bad, math.nan)


def check_examples(reward: Reward, examples: Sequence[RewardExample]) -> None:
    """Score known completions with ``reward``; see `Reward.self_test`."""
    if not examples:
        return
    n = len(examples)
    ids = [list(example.completion.encode()) for example in examples]  # placeholders: there is no tokenizer here
    names = dict.fromkeys(k for example in examples for k in example.columns)
    batch = RewardInput(
        prompts=[example.prompt for example in examples],
        completions=[example.completion for example in examples],
        completion_ids=ids,
        lengths=torch.tensor([len(i) for i in ids]),
        finished=torch.tensor([example.finished for example in examples]),
        group=torch.arange(n),
        columns={k: [example.columns.get(k) for example in examples] for k in names},
        source=[reward.sources[0] if reward.sources else ""] * n,
    )
    for example, value in zip(examples, reward(batch).tolist()):
        if not abs(value - example.value) <= 1e-6:  # a NaN is wrong too
            raise RewardSelfTestError(
                f"Reward {reward.name!r} failed its self-test: the completion {example.completion!r} with "
                f"{example.columns} must score {example.value}, but scored {value}. Training on it would teach "
                "nonsense; fix the reward or its arguments first."
            )


def _sequence_shape(raw: Any) -> tuple[int, ...] | None:
    return (len(raw),) if isinstance(raw, Sequence) and not isinstance(raw, str) else None


def _as_float(entry: Any) -> float:
    """None and NaN stay "not scorable"; what is not a number becomes infinite, which the caller counts."""
    if entry is None:
        return math.nan
    try:
        return math.inf if isinstance(entry, str) else float(entry)
    except (TypeError, ValueError, OverflowError):
        return math.inf
