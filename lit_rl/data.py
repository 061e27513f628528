# SPDX-License-Identifier: Apache-2.0
"""Prompts as a function of (seed, index), and the datamodule that methods draw them from.

The cursor into a stream belongs to the method and is in its checkpoints. The training loader only ticks, nothing is
prefetched, so resuming and rewinding are one assignment.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lit_rl import distributed as ranks
from lit_rl.seeding import mix_seeds

Record = dict[str, Any]
RESERVED = ("prompt", "uid", "source")


def canonical(value: Any) -> str:
    """Text that is equal for equal contents, whatever the order of dictionary keys."""

    def plain(other: Any) -> Any:
        for method in ("tolist", "isoformat", "hex"):
            if hasattr(other, method):
                return getattr(other, method)()
        return f"{type(other).__module__}.{type(other).__qualname__}"

    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=plain)


def content_uid(prompt: Any) -> int:
    """A stable 63-bit identity of a prompt: a hash of its text or messages.

    >>> content_uid("1+2=") == content_uid("1+2=") != content_uid("2+1=")
    True
    """
    return mix_seeds("uid", canonical(prompt))


def digest(*parts: Any) -> str:
    """A short fingerprint of any contents."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=8).hexdigest()


class PromptStream(ABC):
    """Prompts as a function of (seed, index), never of the step.

    A record is a dictionary with ``prompt`` (text, or a list of ``{"role", "content"}`` messages), ``uid`` (int, the
    same in every epoch), ``source`` (str) and any other columns.

    Attributes:
        size: number of different records (an epoch); None if there is no end to them.
    """

    size: int | None = None

    @abstractmethod
    def draw(self, index: int) -> Record:
        """The record at one position of the stream; positions start at 0 and never end."""

    @abstractmethod
    def columns(self) -> set[str]:
        """Names of the columns beside prompt, uid and source."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the data changes: stored in checkpoints and compared on resume."""

    def at(self, cursor: int, n: int) -> list[Record]:
        """The ``n`` records at positions ``cursor … cursor + n - 1``."""
        if cursor < 0 or n < 0:
            raise ValueError(f"positions and counts must not be negative, got at({cursor}, {n}).")
        return [self.draw(index) for index in range(cursor, cursor + n)]


def complete(record: Mapping[str, Any], source: str) -> Record:
    """A copy of a record with ``uid`` and ``source`` filled in where it lacks them."""
    uid = record.get("uid")
    if not isinstance(uid, int):
        uid = content_uid(record["prompt"] if uid is None else uid)
    return {**record, "uid": uid, "source": record.get("source") or source}


class ListStream(PromptStream):
    """A finite list of records, over and over; every epoch has its own order.

    Args:
        records: dictionaries with at least a ``prompt``.
        seed: decides the orders.
        shuffle: whether to permute at all; evaluation keeps the order of the list.
        source: name given to records that have no ``source`` of their own.
    """

    def __init__(self, records: Sequence[Record], seed: int = 0, shuffle: bool = True, source: str = "data") -> None:
        if not records:
            raise ValueError(f"The data source {source!r} has no records: check its path, its split and its filters.")
        for number, record in enumerate(records):
            if "prompt" not in record:
                raise ValueError(
                    f"Record {number} of the data source {source!r} has no 'prompt', only {sorted(record)}: "
                    "name the column that holds it."
                )
        self.records, self.seed, self.shuffle, self.source = records, seed, shuffle, source
        self.size = len(records)
        self._orders: OrderedDict[int, list[int]] = OrderedDict()
        self._columns: set[str] | None = None
        self._fingerprint: str | None = None

    def draw(self, index: int) -> Record:
        epoch, position = divmod(index, len(self.records))
        return complete(self.records[self.order(epoch)[position] if self.shuffle else position], self.source)

    def order(self, epoch: int) -> list[int]:
        """The permutation of one epoch, a function of (seed, epoch); the last two are kept."""
        if epoch not in self._orders:
            order = list(range(len(self.records)))
            random.Random(mix_seeds(self.seed, "epoch", epoch)).shuffle(order)
            self._orders[epoch] = order
            if len(self._orders) > 2:  # a batch may cross the border between two epochs
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def columns(self) -> set[str]:
        if self._columns is None:
            self._columns = {name for record in self.records for name in record} - set(RESERVED)
        return set(self._columns)

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            parts = [digest(record) for record in self.records]
            self._fingerprint = digest("list", parts, self.seed, self.shuffle, self.source)
        return self._fingerprint


class GeneratedStream(PromptStream):
    """Endless records from a generator; record i depends on (seed, i) alone.

    Args:
        generate: makes a record (with at least a ``prompt``) from a random generator.
        seed: decides everything.
        source: name given to records that have no ``source`` of their own.
    """

    def __init__(self, generate: Callable[[random.Random], Record], seed: int = 0, source: str = "generated") -> None:
        self.generate, self.seed, self.source = generate, seed, source

    def draw(self, index: int) -> Record:
        return complete(self.generate(random.Random(mix_seeds(self.seed, "record", index))), self.source)

    def columns(self) -> set[str]:
        return set(self.draw(0)) - set(RESERVED)

    def fingerprint(self) -> str:
        """Hash of the first 16 records: another generator, seed or setting nearly always differs there."""
        return digest("generated", self.at(0, 16))


class MixedStream(PromptStream):
    """Several streams in fixed proportions.

    Draws come in blocks. A block holds each source exactly as often as its weight says, in an order that is a function
    of (seed, block); so the source of a draw and its index inside that source take one block to compute.

    Args:
        sources: streams by name; every record's ``source`` becomes this name.
        weights: relative frequency of each source; default: all alike. Weights that are no simple fractions are
            rounded to thousandths.
        seed: decides the order within blocks.
    """

    def __init__(
        self, sources: Mapping[str, PromptStream], weights: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        check_weights(sources, weights)
        self.sources, self.seed = dict(sources), seed
        weights = weights if weights is not None else dict.fromkeys(sources, 1.0)
        self.counts = block_counts({name: weights[name] for name in sources})
        self.block = sum(self.counts.values())
        self._ends = list(accumulate(self.counts.values()))
        self._names = list(self.counts)
        self._schedules: OrderedDict[int, list[tuple[str, int]]] = OrderedDict()

    def schedule(self, block: int) -> list[tuple[str, int]]:
        """For each draw of a block: the name of its source and the index inside that source."""
        if block not in self._schedules:
            order = list(range(self.block))
            random.Random(mix_seeds(self.seed, "mixture", block)).shuffle(order)
            following = {name: block * count for name, count in self.counts.items()}
            schedule = []
            for slot in order:
                name = self._names[bisect_right(self._ends, slot)]
                schedule.append((name, following[name]))
                following[name] += 1
            self._schedules[block] = schedule
            if len(self._schedules) > 2:
                self._schedules.popitem(last=False)
        return self._schedules[block]

    def draw(self, index: int) -> Record:
        block, position = divmod(index, self.block)
        name, inner = self.schedule(block)[position]
        return relabel(self.sources[name].draw(inner), name)

    def columns(self) -> set[str]:
        """Columns that every source has; a reward that needs another one must name its ``sources``."""
        return set.intersection(*(stream.columns() for stream in self.sources.values()))

    def fingerprint(self) -> str:
        parts = {name: stream.fingerprint() for name, stream in self.sources.items()}
        return digest("mixed", parts, self.counts, self.seed)


class RelabelledStream(PromptStream):
    """A stream whose records carry another source name: an evaluation set under the name it has in a mixture.

    Args:
        stream: the records.
        source: their new name.
    """

    def __init__(self, stream: PromptStream, source: str) -> None:
        self.stream, self.source, self.size = stream, source, stream.size

    def draw(self, index: int) -> Record:
        return relabel(self.stream.draw(index), self.source)

    def columns(self) -> set[str]:
        return self.stream.columns()

    def fingerprint(self) -> str:
        return digest("relabelled", self.stream.fingerprint(), self.source)


def relabel(record: Record, source: str) -> Record:
    """A record of a mixture. Two sources may number their prompts alike: the identity includes the source."""
    return {**record, "uid": mix_seeds(source, record["uid"]), "source": source}


def check_weights(sources: Mapping[str, Any], weights: Mapping[str, float] | None) -> None:
    """Refuse weights that do not belong to the sources or cannot be frequencies."""
    if not sources:
        raise ValueError("A mixture needs at least one source: pass `sources` as a dictionary from name to source.")
    if weights is None:
        return
    if set(weights) != set(sources):
        raise ValueError(f"weights must name exactly the sources {sorted(sources)}, got {sorted(weights)}.")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"The weight of source {name!r} must be a positive number, got {weight}: remove the source instead."
            )


def block_counts(weights: Mapping[str, float], longest: int = 1000) -> dict[str, int]:
    """How often each source occurs in a block, in the shortest block that is exact (or in ``longest`` draws).

    >>> block_counts({"a": 0.7, "b": 0.3})
    {'a': 7, 'b': 3}
    """
    total = sum(weights.values())
    shares = {name: Fraction(weight / total).limit_denominator(longest) for name, weight in weights.items()}
    length = math.lcm(*(share.denominator for share in shares.values()))
    if length <= longest and sum(shares.values()) == 1:
        counts = {name: int(share * length) for name, share in shares.items()}
    else:
        exact = {name: weight / total * longest for name, weight in weights.items()}
        counts = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_remainder[: longest - sum(counts.values())]:
            counts[name] += 1
    for name, count in counts.items():
        if count == 0:
            raise ValueError(
                f"The weight of source {name!r} is below a thousandth of the total: raise it or remove the source."
            )
    return counts


@dataclass
class EvalSet:
    """A named set of evaluation prompts and how to sample for it; None means as the method samples.

    Attributes:
        name: part of the log names ``val/<name>/…``.
        stream: where its prompts come from, starting at position 0.
        limit: number of prompts; None: all of a finite stream.
        samples: completions of each prompt (pass@k needs at least k).
        temperature: sampling temperature.
        top_p: nucleus of the sampling distribution.
        max_tokens: completion budget in tokens.
    """

    name: str
    stream: PromptStream
    limit: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.@-]+", self.name):
            raise ValueError(
                f"The evaluation set's name {self.name!r} becomes part of log names: use letters, digits and ._@- only."
            )
        if self.stream.size is None and self.limit is None:
            raise ValueError(f"The evaluation set {self.name!r} draws from an endless stream: set its `limit`.")
        check_sampling(self.name, self.limit, self.samples, self.temperature, self.top_p, self.max_tokens)

    def __len__(self) -> int:
        """Number of prompts."""
        known = [n for n in (self.stream.size, self.limit) if n is not None]
        return min(known)


def check_sampling(
    name: str,
    limit: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
) -> None:
    """Refuse settings of an evaluation set that make no sense."""
    for label, count in (("limit", limit), ("samples", samples), ("max_tokens", max_tokens)):
        if count is not None and count < 1:
            raise ValueError(f"{label} of the evaluation set {name!r} must be at least 1, got {count}.")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature of the evaluation set {name!r} must not be negative, got {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p of the evaluation set {name!r} must be in (0, 1], got {top_p}.")


class Ticker:
    """The training loader: endless, and carries no data. The method draws its prompts itself."""

    def __iter__(self) -> Iterator[int]:
        tick = 0
        while True:
            yield tick
            tick += 1


class EvalChunks:
    """The prompts of an evaluation set in batches; each rank takes every ``world_size``-th prompt, none is repeated.

    Yields dictionaries: ``records`` and ``draws``, the position of each in the evaluation set. A plain iterable: it has
    no sampler that could be replaced by one that pads with duplicates. Every rank takes the same number of batches,
    unless there are fewer prompts than that on a rank.
    """

    def __init__(self, eval_set: EvalSet, batch_size: int) -> None:
        self.eval_set, self.batch_size = eval_set, batch_size

    def shares(self) -> list[range]:
        """Positions of each batch of this rank."""
        rank, world, total = ranks.rank(), ranks.world_size(), len(self.eval_set)
        mine = range(rank, total, world)
        batches = math.ceil(math.ceil(total / world) / self.batch_size)
        borders = [len(mine) * i // batches for i in range(batches + 1)]
        return [mine[start:end] for start, end in pairwise(borders) if end > start]

    def __len__(self) -> int:
        return len(self.shares())

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        for share in self.shares():
            records = [self.eval_set.stream.draw(position) for position in share]
            yield {"records": records, "draws": list(share)}


class PromptDataModule(LightningDataModule):
    """Where a method's prompts come from. Subclasses implement `build`.

    Args:
        eval_batch_size: prompts of one evaluation batch on one rank.

    Attributes:
        train_stream: what training draws from.
        eval_sets: what validation, test and prediction go through, one loader each.
    """

    def __init__(self, eval_batch_size: int = 64) -> None:
        super().__init__()
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {eval_batch_size}.")
        self.eval_batch_size = eval_batch_size
        self.eval_sets: list[EvalSet] = []
        self._train_stream: PromptStream | None = None

    def build(self, stage: str) -> None:
        """Set ``train_stream`` and ``eval_sets``; ``stage`` is ``fit``, ``validate``, ``test`` or ``predict``."""
        raise TypeError(f"{type(self).__name__} must define build(stage), which sets train_stream and eval_sets.")

    def setup(self, stage: str) -> None:
        """Build the data, and check that the stage has what it needs."""
        stage = TrainerFn(stage).value  # Lightning passes an enumeration, whose text would be TrainerFn.PREDICTING
        self.build(stage)
        names = [s.name for s in self.eval_sets]
        if len(set(names)) < len(names):
            raise ValueError(f"Evaluation sets must have different names, got {names}.")
        if stage == "fit":
            _ = self.train_stream
        elif not names:
            raise ValueError(f"There is nothing to {stage}: {type(self).__name__} was given no evaluation data.")

    @property
    def train_stream(self) -> PromptStream:
        if self._train_stream is None:
            raise ValueError(f"There is nothing to train on: {type(self).__name__} was given no training data.")
        return self._train_stream

    @train_stream.setter
    def train_stream(self, stream: PromptStream) -> None:
        self._train_stream = stream

    @property
    def trains(self) -> bool:
        """Whether there is training data, once it is built."""
        return self._train_stream is not None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Of all hooks of Lightning the one that runs between two steps, when the last one is logged and validated."""
        trainer: Any = self.trainer
        if trainer.training:
            trainer.lightning_module.begin_step()
        return batch

    def train_dataloader(self) -> Ticker:
        return Ticker()

    def val_dataloader(self) -> list[EvalChunks]:
        return [EvalChunks(eval_set, self.eval_batch_size) for eval_set in self.eval_sets]

    def test_dataloader(self) -> list[EvalChunks]:
        return self.val_dataloader()

    def predict_dataloader(self) -> list[EvalChunks]:
        return self.val_dataloader()
