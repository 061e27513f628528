# SPDX-License-Identifier: Apache-2.0
"""Rows of a table, one by one, from a file, a folder or the Hugging Face hub; each with where it stands."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | str]]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_rows(path: str, split: str, subset: str | None = None, revision: str | None = None) -> Rows:
    """Read a table.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a pattern such as ``data/*.jsonl`` (the
            files in alphabetical order), a folder, or the id of a dataset on the hub. A folder holds a file
            ``<split>.jsonl`` (or another of these formats), or it is in hub format, or it was written by
            ``datasets.save_to_disk``.
        split: part of a folder or hub dataset; files have no parts.
        subset: configuration of a folder in hub format or of a hub dataset.
        revision: branch, tag or commit of a hub dataset.

    Yields:
        Where the row stands (``train.jsonl, line 3``), and the row; or, instead of the row, what is wrong with it.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: a package is missing.
        OSError: the hub cannot be reached, or does not have the dataset.
        ValueError: the format or the split is unknown.
    """
    files = find_files(path, split)
    for file in files:
        yield from READERS[file.suffix](file)
    if not files:
        for number, row in enumerate(load_dataset(path, split, subset, revision), start=1):
            yield f"{path} ({split}), row {number}", row


def find_files(path: str, split: str) -> list[Path]:
    """The files that ``path`` names, none if it is a folder in hub format or a hub dataset."""
    place = Path(path).expanduser()
    if any(c in path for c in "*?["):
        files = [Path(name) for name in sorted(glob(str(place)))]
        if not files:
            raise FileNotFoundError(f"No file matches {path}.")
    elif place.is_dir():
        files = [file for file in (place / f"{split}{suffix}" for suffix in READERS) if file.is_file()][:1]
    else:
        files = [place] if place.is_file() or place.suffix in READERS else []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}.")
        if file.suffix not in READERS:
            raise ValueError(f"{file} is of no known format: use one of {', '.join(READERS)}.")
    return files


def read_jsonl(file: Path) -> Rows:
    """One JSON object a line; empty lines are left out."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:  # which counts lines too, within this one
                yield where, f"is not valid JSON ({error.msg} at column {error.colno})"
                continue
            except UnicodeDecodeError as error:
                yield where, f"is not valid UTF-8 ({error.reason} at byte {error.start + 1})"
                continue
            yield where, row if isinstance(row, dict) else f"holds {type(row).__name__}, not a JSON object"


def read_json(file: Path) -> Rows:
    """A JSON list of objects."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        advice = "a file with one object a line has a name that ends in .jsonl"
        raise ValueError(f"{file} is not one JSON value ({error}); {advice}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a JSON list of objects, not {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        where = f"{file}, entry {number}"
        yield where, row if isinstance(row, dict) else f"is {type(row).__name__}, not a JSON object"


def read_csv(file: Path) -> Rows:
    """A table with a header line; every value is text."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
        for row in table:
            width = len(table.fieldnames or ())
            complete = None not in row and None not in row.values()
            yield f"{file}, line {table.line_num}", row if complete else f"does not have {width} fields as the header"


def read_parquet(file: Path) -> Rows:
    """A parquet file, a batch of rows at a time."""
    require("pyarrow", f"Reading {file}")
    from pyarrow.parquet import ParquetFile

    number = 0
    with ParquetFile(file) as table:
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def load_dataset(path: str, split: str, subset: str | None = None, revision: str | None = None) -> Any:
    """A folder in hub format or written by ``save_to_disk``, or a dataset of the hub, as a `datasets.Dataset`.

    What is not there yet is downloaded and converted into the cache of that package.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"There is no file or folder {path}, and it is no hub id (like openai/gsm8k) either.")
    require("datasets", f"Reading {path}")
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        table = datasets.load_from_disk(str(folder))
        if not isinstance(table, datasets.DatasetDict):
            return table
        if split not in table:
            raise ValueError(f"{path} has no split {split!r}, only {sorted(table)}.")
        return table[split]
    try:
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, subset, split=split, revision=revision)
    except ValueError as error:  # unknown split or subset: the message lists those that there are
        raise ValueError(f"Cannot read split {split!r} of {path}: {error}") from error
    except OSError as error:  # no network, no such dataset, or one that needs a login
        if folder.is_dir():
            raise
        raise OSError(
            f"Cannot load {path} from the Hugging Face hub ({' '.join(str(error).split())}): check its name and the "
            "network, or name a local file or folder in `path`."
        ) from error


def require(package: str, what: str) -> None:
    """Refuse, with advice, if a package of the extra ``data`` is missing."""
    if find_spec(package) is None:
        raise ImportError(f"{what} needs the package {package}: pip install 'lit-rl[data]'.")
