# SPDX-License-Identifier: Apache-2.0
"""``make bench``: run the benchmarks one after the other and write their tables into the documentation.

    python benchmarks/run_all.py                      # all; about half an hour on two cores, which should be idle
    python benchmarks/run_all.py trl_step imports     # some; the others keep their last figures
    python benchmarks/run_all.py --page               # no measurement: the page from the figures that are there
    python benchmarks/run_all.py --smoke              # tiny sizes, page untouched: does everything run?

Every script leaves its figures in ``runs/benchmarks/results``; the tables in the documentation are made from these
files. Those of a script that has not run here stay as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, WORK, Report, markdown_table

# Script and the arguments of its smoke test; None: it has no small size.
SCRIPTS: dict[str, list[str] | None] = {
    "quickstart_seeds": None,
    "time_to_reward": ["--smoke"],
    "trl_step": ["--smoke", "--repeats", "2", "--rounds", "1"],
    "generation": ["--prompts", "2", "--group-size", "2", "--max-tokens", "8", "--repeats", "1"],
    "head_memory": ["--smoke", "--repeats", "1"],
    "divergence_memory": ["--smoke"],
    "scaling": ["--smoke", "--repeats", "3"],
    "overhead": ["--smoke", "--repeats", "5"],
    "callback_overhead": ["--smoke"],
    "rollouts": ["--smoke"],
    "two_stage": ["--smoke"],
    "simulate_rollouts": ["--smoke"],
    "imports": ["--smoke"],
}
PAGES = {  # which figures stand where
    ROOT / "docs" / "benchmarks.md": tuple(SCRIPTS),
    ROOT / "docs" / "samplers.md": ("rollouts", "two_stage"),
}
BEGIN, END = "<!-- {}: begin (written by benchmarks/run_all.py) -->", "<!-- {}: end -->"


def title_of(name: str) -> str:
    """First sentence of a script's docstring."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    return text.split('"""')[1].strip().split("\n\n")[0].replace("\n", " ")


def section(path: Path) -> str:
    """The part of the page that belongs to one file of figures."""
    data = json.loads(path.read_text())
    if "benchmark" in data:
        return Report.load(path).markdown()
    return plain_section(path.stem, data)


def plain_section(name: str, data: dict[str, Any]) -> str:
    """A section for scripts with figures of their own form: lists and dictionaries of rows become tables."""
    parts = [f"## {name.replace('_', ' ').capitalize()}", title_of(name)]
    scalars: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(markdown_table(value))
        elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            parts.append(markdown_table([{"": k, **v} for k, v in value.items()]))
        elif key == "hardware":
            parts.insert(2, f"{value}.")
        elif not isinstance(value, (dict, list)):
            scalars[key] = value
    if scalars:
        parts.append(markdown_table([scalars]))
    return "\n\n".join(parts) + "\n"


def write_pages(results: Path) -> None:
    """Put the tables of every file of figures between their markers; where there is no file, the last ones stay."""
    for page, names in PAGES.items():
        for name in names:
            path = results / f"{name}.json"
            if path.exists():
                whole = page.stem == "benchmarks"
                body = section(path) if whole else Report.load(path).tables_as_markdown()
                put_between(page, BEGIN.format(name), END.format(name), body)


def put_between(page: Path, begin: str, end: str, body: str) -> None:
    """Replace what stands between two lines of a page."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} must hold the lines {begin!r} and {end!r}: the tables go between them.")
    page.write_text(f"{before}{begin}\n\n{body}\n{end}{after}")
    print(f"Wrote {page.relative_to(ROOT)}")


def run(name: str, target: Path, extra: list[str]) -> bool:
    """Run one script; whether it succeeded."""
    print(f"\n=== {name}", flush=True)
    start = time.perf_counter()
    script = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", str(target), *extra]
    good = subprocess.run(script, cwd=ROOT).returncode == 0
    print(f"=== {name}: {'done' if good else 'FAILED'} after {time.perf_counter() - start:.0f} s", flush=True)
    return good


def main() -> None:
    """Run what was asked for, then write the page."""
    there = [name for name in SCRIPTS if (ROOT / "benchmarks" / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(there)}; default: all")
    parser.add_argument("--page", action="store_true", help="write the page from the figures that are there")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the page is left alone")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(there))
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(there)}")
    results = WORK / ("smoke" if options.smoke else "results")
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [] if options.page else options.names or there:
        extra = SCRIPTS[name] if options.smoke else []
        if extra is not None and not run(name, results / f"{name}.json", extra):
            failed.append(name)
    if not options.smoke:
        write_pages(results)
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
