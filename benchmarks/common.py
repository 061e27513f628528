# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: arguments, hardware, medians, tables, goals, and their JSON form.

A script measures, fills a `Report` and hands it to `finish`, which prints its tables and writes them for ``--json``.
``benchmarks/run_all.py`` makes the page of the documentation from these files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: two spinning threads beside a busy neighbour are slow
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "benchmarks"


@dataclass
class Table:
    """A titled table; every row is a dictionary from column to value."""

    title: str
    rows: list[dict[str, Any]]


@dataclass
class Goal:
    """What was to be reached. ``sense`` is ``"at least"`` or ``"at most"``; None as the measured value: not run."""

    what: str
    measured: float | None
    sense: str
    bound: float
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.sense == "at least" else self.measured <= self.bound


@dataclass
class Report:
    """The result of a script."""

    benchmark: str
    title: str
    text: str
    hardware: str
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    smoke: bool = False

    @staticmethod
    def load(path: Path) -> Report:
        data = json.loads(path.read_text())
        data["tables"] = [Table(**t) for t in data["tables"]]
        data["goals"] = [Goal(**{k: v for k, v in g.items() if k != "met"}) for g in data["goals"]]
        return Report(**data)

    def save(self, path: Path) -> None:
        data = asdict(self)
        for goal, entry in zip(self.goals, data["goals"]):
            entry["met"] = goal.met
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n")

    def markdown(self, level: int = 2) -> str:
        """The report as a section of a page."""
        parts = [f"{'#' * level} {self.title}", self.text.strip(), f"{self.hardware}."]
        if self.smoke:
            parts.append("**Sizes of a smoke test: these figures mean nothing.**")
        parts += self._tables()
        if self.goals:
            parts.append(markdown_table([goal_row(g) for g in self.goals]))
        return "\n\n".join(parts) + "\n"

    def tables_as_markdown(self) -> str:
        """The tables and what they were measured on, for a page that explains them itself."""
        return "\n\n".join([f"Measured on: {self.hardware}.", *self._tables()]) + "\n"

    def _tables(self) -> list[str]:
        return [part for table in self.tables for part in (f"**{table.title}**", markdown_table(table.rows))]


def goal_row(goal: Goal) -> dict[str, Any]:
    """A goal as a row of a table."""
    verdict = {True: "met", False: "missed", None: "not run"}[goal.met]
    unit = f" {goal.unit}" if goal.unit else ""
    measured = "" if goal.measured is None else f"{number(goal.measured)}{unit}"
    return {"goal": f"{goal.what}: {goal.sense} {number(goal.bound)}{unit}", "measured": measured, "": verdict}


def number(value: Any) -> str:
    """A value in three or four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 4
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if value else "0"


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table that is readable as text too; columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([number(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    numeric = [all(not isinstance(row.get(name, 0), str) for row in rows) for name in columns]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if right else "-" * (w + 2) for w, right in zip(widths, numeric))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def arguments(doc: str | None, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that the script runs, measures nothing")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measurements of each figure (default {repeats})")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device cuda`` runs the sizes that suit an accelerator."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print the report, write it if asked to."""
    report.smoke = bool(options.smoke)
    print(report.markdown())
    if options.json:
        report.save(options.json)


def hardware(device: str = "cpu") -> str:
    """Processor, memory, threads and versions that a figure belongs to."""
    import torch

    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {processor}; {versions}"
    return f"{processor}; {torch.get_num_threads()} threads; {versions}"


def processor_name() -> str:
    """The processor as the system calls it, with its family and model where the name alone says little."""
    fields: dict[str, str] = {}
    try:
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = entry.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    if any(c.isdigit() for c in name):
        return name
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def median(values: Sequence[float]) -> float:
    """The median; at least five values, so that one bad second does not decide."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Smallest and largest value."""
    return f"{number(min(values))} to {number(max(values))}"
