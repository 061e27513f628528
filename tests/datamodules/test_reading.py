# SPDX-License-Identifier: Apache-2.0
"""Tables of every format give the same rows; what is broken is named with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_rl.datamodules.reading import load_dataset, read_rows

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(5)]


def write_jsonl(file: Path, rows: list[Any] = ROWS) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_table(file: Path) -> Path:
    if file.suffix == ".jsonl":
        write_jsonl(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif file.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        lines = [("question", "answer"), *((r["question"], r["answer"]) for r in ROWS)]
        file.write_text("\ufeff" + "\n".join(separator.join(line) for line in lines) + "\n")
    return file


def rows_of(path: Path | str, split: str = "train", **options: Any) -> list[Any]:
    return [row for _, row in read_rows(str(path), split, **options)]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
def test_a_file_of_any_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    file = write_table(tmp_path / f"train{suffix}")
    assert rows_of(file) == ROWS
    assert rows_of(tmp_path) == ROWS  # a folder with a file for the split


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert rows_of(tmp_path, "train", subset="main") == ROWS
    assert rows_of(tmp_path, "test") == ROWS[:2]


def test_a_pattern_names_several_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-1.jsonl", ROWS[3:])
    write_jsonl(tmp_path / "part-0.jsonl", ROWS[:3])
    assert rows_of(tmp_path / "part-*.jsonl") == ROWS
    with pytest.raises(FileNotFoundError, match="No file matches"):
        rows_of(tmp_path / "shard-*.jsonl")


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "b"\n[1, 2]\n{"prompt": "\xff"}\n{"prompt": "c"}')
    read = list(read_rows(str(file), "train"))
    assert [where.rpartition(", ")[2] for where, _ in read] == ["line 1", "line 3", "line 4", "line 5", "line 6"]
    complaints = [row for _, row in read if isinstance(row, str)]
    assert complaints[0].startswith("is not valid JSON (")
    assert complaints[1] == "holds list, not a JSON object"
    assert complaints[2] == "is not valid UTF-8 (invalid start byte at byte 13)"
    assert [row for _, row in read if isinstance(row, dict)] == [{"prompt": "a"}, {"prompt": "c"}]


def test_a_line_of_another_width_than_the_header_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('a,b\n1,"two\nlines"\n3\n4,5,6\n')
    read = list(read_rows(str(file), "train"))
    assert read[0][1] == {"a": "1", "b": "two\nlines"}
    assert [where.rpartition(", ")[2] for where, row in read if isinstance(row, str)] == ["line 4", "line 5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"prompt": "a"}\n{"prompt": "b"}', "ends in .jsonl"), ('{"prompt": "a"}', "must hold a JSON list")],
)
def test_a_json_file_that_is_no_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        rows_of(file)


def test_what_is_not_there_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.datamodules.reading.require", lambda *_: pytest.fail("went on to the hub"))
    with pytest.raises(FileNotFoundError, match=r"There is no file data/train\.jsonl"):
        rows_of("data/train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere/at/all, and it is no hub id"):
        rows_of(tmp_path / "nowhere/at/all")
    (tmp_path / "rows.xml").write_text("<x/>")
    with pytest.raises(ValueError, match=r"no known format: use one of \.jsonl"):
        rows_of(tmp_path / "rows.xml")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.datamodules.reading.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openai/gsm8k needs the package datasets: pip install 'lit-rl\[data\]'"):
        rows_of("openai/gsm8k")
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ImportError, match="needs the package pyarrow"):
        rows_of(tmp_path / "rows.parquet")


# The hub's formats --------------------------------------------------------------------------------------------------


def write_hub_folder(folder: Path) -> Path:
    """A dataset as it lies on the hub: parquet files, and a card that says which split and subset they are."""
    datasets = pytest.importorskip("datasets")
    (folder / "main").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "main" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[:2]).to_parquet(folder / "main" / "test-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: main/{s}-*\n" for s in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    return folder


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_in_hub_format_is_read_by_split_and_subset(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "hub")
    assert rows_of(folder, "train", subset="main") == ROWS
    assert rows_of(folder, "test") == ROWS[:2]
    assert rows_of(folder, "train[1:3]") == ROWS[1:3]
    where, _ = next(iter(read_rows(str(folder), "train")))
    assert where == f"{folder} (train), row 1"
    with pytest.raises(ValueError, match=r"Cannot read split 'validation' .*Should be one of \['train', 'test'\]"):
        rows_of(folder, "validation")
    with pytest.raises(ValueError, match=r"'socratic' not found. Available: \['main'\]"):
        rows_of(folder, "train", subset="socratic")


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_written_by_save_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "several")
    assert rows_of(tmp_path / "single") == rows_of(tmp_path / "several") == ROWS
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        rows_of(tmp_path / "several", "test")


def test_a_hub_id_is_asked_of_the_hub_with_its_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or ROWS)
    assert load_dataset("openai/gsm8k", "test", "main", "abc") == ROWS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
