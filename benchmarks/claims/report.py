# SPDX-License-Identifier: Apache-2.0
"""Tables with paired intervals, a figure for each claim, and the page that holds them all."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import Claim, Overrides, series

DOCS = Path("docs/claims")
MOST_COLUMNS = 4  # arms beside the baseline that a table has columns for; more of them are rows
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131}


@dataclass
class Results:
    """The finished runs of a claim."""

    claim: Claim
    seeds: Sequence[int]
    runs: dict[str, list[Path]]
    policy: Path

    def values(self, arm: str, label: str) -> list[float]:
        """A metric of each seed's run."""
        metric = next(m for m in self.claim.metrics if m.label == label)
        return [metric.read(run) for run in self.runs[arm]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); infinite width for one value.

    >>> interval([1.0, 2.0, 3.0])
    (2.0, 2.484338...)
    """
    if any(not math.isfinite(v) for v in values):
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.inf
    degrees = len(values) - 1
    quantile = T95[max(d for d in T95 if d <= degrees)]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def number(value: float) -> str:
    """A number for a table."""
    return "not reached" if math.isinf(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def cell(values: Sequence[float]) -> str:
    """Mean ± half width; where a run never got there, each run's value."""
    if any(not math.isfinite(v) for v in values):
        return ", ".join(number(v) for v in values)
    mean, half = interval(values)
    return number(mean) if math.isinf(half) else f"{number(mean)} ± {number(half)}"


def difference(baseline: Sequence[float], method: Sequence[float], better: str) -> str:
    """The seed-paired difference, and whether its interval excludes 0."""
    gaps = [m - b for b, m in zip(baseline, method, strict=True)]
    if any(not math.isfinite(g) for g in gaps):
        return "–"
    mean, half = interval(gaps)
    if math.isinf(half):
        return f"{mean:+.3g}, one seed"
    if abs(mean) <= half:
        return f"{mean:+.3g} ± {half:.2g}, no clear difference"
    return f"**{mean:+.3g} ± {half:.2g}**, {'better' if (mean > 0) == (better == 'higher') else 'worse'}"


def counted(baseline: Sequence[float], method: Sequence[float]) -> tuple[str, str]:
    """Of how many runs something is true, and how many more that are than of the baseline's."""
    more = sum(method) - sum(baseline)
    return f"{sum(method):.0f} of {len(method)}", f"{more:+.0f}" if more else "none more"


def compare(results: Results, baseline: str, method: str, label: str) -> str:
    """One metric of two arms in words."""
    better = next(m.better for m in results.claim.metrics if m.label == label)
    return difference(results.values(baseline, label), results.values(method, label), better)


def seeds_higher(results: Results, baseline: str, method: str, label: str) -> str:
    """In how many seeds a metric of one arm is higher than another's: where a few large values widen an interval."""
    pairs = zip(results.values(baseline, label), results.values(method, label), strict=True)
    higher = sum(m > b for b, m in pairs)
    return f"higher in {higher} of {len(results.seeds)} seeds"


def table(results: Results) -> str:
    """One row a metric: every arm's mean and interval, and its paired difference to the baseline. Many arms: rows."""
    first, *others = (arm.name for arm in results.claim.arms)
    grid = [["metric", first, *(h for name in others for h in (name, f"{name} − {first}"))]]
    for metric in results.claim.metrics:
        base = results.values(first, metric.label)
        row = [f"{metric.label} ({metric.better} is better)"]
        row.append(counted(base, base)[0] if metric.counts else cell(base))
        for name in others:
            values = results.values(name, metric.label)
            row += counted(base, values) if metric.counts else (cell(values), difference(base, values, metric.better))
        grid.append(row)
    if len(others) > MOST_COLUMNS:
        grid = [list(row) for row in zip(*grid, strict=True)]
    head, *rows = (f"| {' | '.join(row)} |" for row in grid)
    return "\n".join([head, f"|{'---|' * len(grid[0])}", *rows])


def plot(results: Results, path: Path) -> None:
    """Every curve of the claim, one panel each: thin lines the seeds, thick lines their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = results.claim.curves
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for colour, (arm, runs) in enumerate(results.runs.items()):
            lines = [dict(series(run, name)) for run in runs]
            for line in lines:
                axis.plot(list(line), list(line.values()), color=f"C{colour}", alpha=0.2, linewidth=0.8)
            shared = sorted(set.intersection(*(set(line) for line in lines)))
            means = [statistics.fmean(line[clock] for line in lines) for clock in shared]
            axis.plot(shared, means, color=f"C{colour}", linewidth=1.8, label=arm)
        axis.set(title=name, xlabel="training step (clock)")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spelled(overrides: Overrides) -> list[str]:
    """Overrides as a reader would say them: added objects by class and arguments, single values by name."""
    said = []
    for key, value in overrides.items():
        name = key.removeprefix("model.").removeprefix("trainer.").replace("init_args.", "")
        if key.endswith("+"):
            for item in value:
                own = ", ".join(f"{k}={v!r}" for k, v in item.get("init_args", {}).items())
                said.append(f"`{item['class_path'].rsplit('.', 1)[-1]}({own})`")
        else:
            said.append(f"`{name}` the teacher's folder" if value == "{teacher}" else f"`{name}: {value}`")
    return said


def arms(claim: Claim) -> str:
    """What each arm adds to the configuration that all share."""
    start = [f"`{path}`" for path in claim.warm_start.configs] + spelled(claim.warm_start.overrides)
    shared = [f"`{path}`" for path in claim.configs] + spelled(claim.overrides)
    lines = [f"- warm start: {', '.join(start)}", f"- all arms: {', '.join(shared)}"]
    for arm in claim.arms:
        own = [f"`{path}`" for path in arm.configs] + spelled(arm.overrides)
        lines.append(f"- `{arm.name}`: {'adds ' + ', '.join(own) if own else 'adds nothing, the baseline'}")
    return "\n".join(["Configurations:", "", *lines])


def hardware() -> str:
    """Processor, cores, torch."""
    import torch

    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}; one thread a run, two runs side by side"


def write(results: Results, verdict: str) -> dict[str, Any]:
    """Write ``<name>.md``, ``<name>.json`` and ``<name>.png`` below ``docs/claims``, and return the numbers."""
    claim = results.claim
    DOCS.mkdir(parents=True, exist_ok=True)
    plot(results, DOCS / f"{claim.name}.png")
    seconds = {
        arm: statistics.fmean(json.loads((run / "done.json").read_text())["seconds"] for run in runs)
        for arm, runs in results.runs.items()
    }
    numbers = {
        "claim": claim.sentence,
        "seeds": list(results.seeds),
        "metrics": {m.label: {a.name: results.values(a.name, m.label) for a in claim.arms} for m in claim.metrics},
        "seconds": seconds,
        "hardware": hardware(),
    }
    (DOCS / f"{claim.name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    times = ", ".join(f"{arm} {value:.0f} s" for arm, value in seconds.items())
    blocks = [
        f"## {claim.title}",
        f"> {claim.sentence} ({claim.source})",
        claim.setup,
        table(results),
        f"Mean ± half width of the 95 % interval over seeds {', '.join(map(str, results.seeds))}; differences are paired "
        "by seed.",
        verdict,
        f"![curves]({DOCS.name}/{claim.name}.png)",
        claim.extra(results) if claim.extra is not None else "",
        "\n".join(["Designs tried before that did not show it:", "", *(f"- {text}" for text in claim.tried)])
        if claim.tried
        else "",
        arms(claim),
        f"Seconds a run: {times}. Hardware: {hardware()}. Run it: `make claims NAME={claim.name}`.",
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    (DOCS / f"{claim.name}.md").write_text(text)
    return numbers


def assemble(order: Sequence[str]) -> None:
    """Put the sections that exist on one page."""
    head = """# Claims

What each intervention is said to do, tried at small scale: baseline and method over the same seeds on the task of the
quickstart or a variation of it, on a CPU. All arms of a claim start from one warm-started policy; the seeds decide
prompts and sampling. Every table is written by `make claims` from real runs; a claim that does not hold here is
reported as such.
"""
    sections = [(DOCS / f"{name}.md").read_text() for name in order if (DOCS / f"{name}.md").exists()]
    missing = [name for name in order if not (DOCS / f"{name}.md").exists()]
    if missing:
        sections.append(f"Not run to their end yet: {', '.join(missing)}.\n")
    Path("docs/claims.md").write_text("\n".join([head, *sections]))
