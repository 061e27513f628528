# SPDX-License-Identifier: Apache-2.0
"""`Source`: where records come from and what is done to them on the way; `EvalSource`: the same for evaluation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lit_rl.data import EvalSet, ListStream, Record, canonical, check_sampling
from lit_rl.datamodules.reading import READERS, Row, find_files, load_dataset, read_rows
from lit_rl.seeding import mix_seeds

PromptTemplate = str | list[dict[str, str]]

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass
class Source:
    """A table of prompts. Its rows are renamed, mapped, filtered, made into prompts and counted off, in this order.

    A record keeps every column of its row: rewards read them (``answer``), samplers may (``completion``). A column
    ``uid`` (an int) and a column ``source`` (a text) are taken as the record's identity and source.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a pattern such as ``data/*.jsonl``, a
            folder with a file for each split or in hub format, or the id of a dataset on the hub.
        split: part of a folder or hub dataset; default ``train`` for training and ``test`` for evaluation.
        subset: configuration of a hub dataset.
        revision: branch, tag or commit of a hub dataset.
        name: what the records' ``source`` is called; default: their own, or else the end of the path.
        columns: new names of columns: ``{prompt: question}``. ``{answer: reward_model.ground_truth}`` reaches into a
            dictionary.
        map: takes a record and returns the one to go on with, or None to leave it out.
        filters: take a record and say whether to keep it.
        template: what the prompt is made of: text, or a list of messages ``{"role": …, "content": …}``, in which
            ``{column}`` stands for the value of a column. Other braces stay as they are. None: the column ``prompt``
            is the prompt, a text or a list of messages.
        part: keep the prompts whose hash falls into this part of [0, 1). ``(0, 0.9)`` here and ``(0.9, 1)`` elsewhere
            divide a table without overlap, also where prompts occur twice.
        limit: keep this many records, the first ones.
        malformed: what to do with a row that is broken or has no prompt: ``"error"`` stops with its place in the file,
            ``"skip"`` leaves it out and counts.

    Attributes:
        skipped: malformed rows that `records` left out.
    """

    path: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    map: Callable[[Record], Record | None] | None = None
    filters: list[Callable[[Record], bool]] = field(default_factory=list)
    template: PromptTemplate | None = None
    part: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    malformed: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of {self.path} must be at least 1, got {self.limit}; None keeps all records.")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part of {self.path} must be (start, end) with 0 <= start < end <= 1, got {self.part}.")
        if self.malformed not in ("error", "skip"):
            raise ValueError(f"malformed must be 'error' or 'skip', got {self.malformed!r}.")
        self.skipped = 0

    @property
    def label(self) -> str:
        """The name of the records' source where they have none of their own."""
        name = PurePosixPath(self.path).name
        suffix = PurePosixPath(name).suffix
        return self.name or name.removesuffix(suffix if suffix in READERS else "").replace("*", "") or "data"

    def records(self, split: str = "train") -> list[Record]:
        """Read everything.

        Args:
            split: part of a folder or hub dataset, if the source names none.

        Raises:
            ValueError: a row is malformed, a column is missing, or nothing is left.
        """
        self.skipped, first_problem = 0, ""
        records: list[Record] = []
        for where, record in self._made(self.split or split):
            if isinstance(record, str):
                if self.malformed == "error":
                    raise ValueError(f"{where} {record}. Correct it, or set malformed='skip' to leave such rows out.")
                self.skipped += 1
                first_problem = first_problem or f"{where} {record}"
                continue
            records.append(record)
            if len(records) == self.limit:
                break
        if self.skipped and records:
            warnings.warn(
                f"{self.skipped} malformed row(s) of {self.path} were left out; the first: {first_problem}.",
                stacklevel=2,
            )
        if not records:
            reason = f" Every row is malformed: {first_problem}." if self.skipped else ""
            raise ValueError(f"{self.path} gives no records: check its split, filters and part.{reason}")
        return records

    def stream(self, seed: int = 0, shuffle: bool = True, split: str = "train") -> ListStream:
        """The records as a stream, in an order of its own in every epoch."""
        return ListStream(self.records(split), seed, shuffle, self.label)

    def prepare(self, split: str = "train") -> None:
        """Download a dataset of the hub, unless the cache has it; called once on each machine."""
        if not Path(self.path).expanduser().exists() and not find_files(self.path, self.split or split):
            load_dataset(self.path, self.split or split, self.subset, self.revision)

    def divide(self, held_out: float, **settings: Any) -> tuple[Source, EvalSource]:
        """Two sources without a common prompt.

        Args:
            held_out: share of the prompts that the second one gets.
            settings: arguments of the second, an `EvalSource`.
        """
        start, end = self.part
        border = end - held_out * (end - start)
        own = {f.name: getattr(self, f.name) for f in fields(Source)} | {"split": self.split or "train", "limit": None}
        return replace(self, part=(start, border)), EvalSource(**{**own, **settings, "part": (border, end)})

    def _made(self, split: str) -> Iterator[tuple[str, Record | str]]:
        """Where each row stands, and the record that it becomes, or what is wrong with it."""
        for where, row in read_rows(self.path, split, self.subset, self.revision):
            try:
                record = self._prepared(row) if isinstance(row, dict) else row
            except Exception as error:
                error.add_note(f"(while reading {where})")
                raise
            if record is not None:
                yield where, record

    def _prepared(self, row: Row) -> Record | str | None:
        """The record of a row, a complaint, or None if it is filtered out."""
        try:
            record = rename(row, self.columns)
        except KeyError as error:
            return f"has no column {error.args[0]!r}, only {sorted(row)}"
        mapped = record if self.map is None else self.map(record)
        if mapped is None or not all(keep(mapped) for keep in self.filters):
            return None
        record = mapped
        if self.template is not None:
            try:
                record["prompt"] = fill(self.template, record)
            except KeyError as error:
                return f"has no column {error.args[0]!r} for the template, only {sorted(record)}"
        problem = problem_of(record)
        if problem is not None:
            return problem
        if self.part != (0.0, 1.0) and not self.part[0] <= position(record["prompt"]) < self.part[1]:
            return None
        return record if self.name is None else {**record, "source": self.name}


@dataclass
class EvalSource(Source):
    """A table of evaluation prompts and how to sample for it; None means as the method samples.

    Args:
        samples: completions of each prompt (pass@k needs at least k).
        temperature: sampling temperature.
        top_p: nucleus of the sampling distribution.
        max_tokens: completion budget in tokens.
    """

    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.label, self.limit, self.samples, self.temperature, self.top_p, self.max_tokens)

    def eval_set(self, split: str = "test") -> EvalSet:
        """Read everything; the records stay in the order of the table."""
        name = re.sub(r"[^\w.@-]", "_", self.label)
        stream = self.stream(shuffle=False, split=split)
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return EvalSet(name, stream, samples=self.samples, max_tokens=self.max_tokens, **sampling)


def hold_out(train: Source, official: EvalSource, held_out: float, limit: int | None) -> tuple[Source, EvalSource]:
    """What to train on and what to validate on: a share of the training problems, or (at 0) the official set."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the training problems and must be in [0, 1), got {held_out}.")
    settings = {name: getattr(official, name) for name in ("map", "samples", "temperature", "top_p", "max_tokens")}
    if held_out:
        return train.divide(held_out, **settings, limit=limit)
    return train, replace(official, limit=limit)


def rename(row: Row, columns: dict[str, str]) -> Record:
    """A row with new names; ``KeyError`` with the name of a column that is not there.

    >>> rename({"question": "1+1?", "info": {"gold": 2}}, {"prompt": "question", "answer": "info.gold"})
    {'info': {'gold': 2}, 'prompt': '1+1?', 'answer': 2}
    """
    found = {new: look_up(row, old) for new, old in columns.items()}
    return {**{name: value for name, value in row.items() if name not in columns.values()}, **found}


def look_up(row: Row, name: str) -> Any:
    """A column, or an entry of a dictionary in a column, written ``column.entry``."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def fill(template: PromptTemplate, record: Record) -> Any:
    r"""A template with the values of columns in it; ``KeyError`` with the name of a column that is not there.

    >>> fill("{a}+{b} in \\boxed{}: ", {"a": 1, "b": 2})
    '1+2 in \\boxed{}: '
    """
    if isinstance(template, str):
        return _FIELD.sub(lambda match: str(record[match[1]]), template)
    return [{**message, "content": fill(message["content"], record)} for message in template]


def problem_of(record: Record) -> str | None:
    """What is wrong with a record's prompt; None if nothing is."""
    if "prompt" not in record:
        return f"has no column 'prompt', only {sorted(record)}; name the right one in `columns`, or write a `template`"
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return None if prompt.strip() else "has an empty prompt"
    if not isinstance(prompt, list) or not prompt:
        return f"has a prompt that is neither text nor a list of messages, but {type(prompt).__name__}"
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"has a message in its prompt without 'role' and 'content': {message!r}"
    return None


def position(prompt: Any) -> float:
    """Where in [0, 1) the hash of a prompt falls."""
    return mix_seeds("part", canonical(prompt)) / 2**63
