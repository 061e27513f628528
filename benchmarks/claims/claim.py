# SPDX-License-Identifier: Apache-2.0
"""What a claim is: configurations, arms, metrics and a sentence; and how a metric is read from a finished run."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Read = Callable[[Path], float]
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class WarmStart:
    """How the policy that every arm starts from is made; cached by a hash of exactly this and of the named files.

    Attributes:
        configs: files of the supervised run.
        overrides: single values over those.
        seed: of weights and data.
        vocabulary_size: entries of the character tokenizer.
    """

    configs: Sequence[str] = ("configs/quickstart-warmup.yaml",)
    overrides: Overrides = field(default_factory=dict)
    seed: int = 1
    vocabulary_size: int = 64


COLD_START = WarmStart(
    overrides={"model.init_args.max_rollouts": 250, "model.init_args.scheduler.init_args.total": 250}
)
"""A third of the quickstart's warm start: the policy knows the form of a solution and is rarely right."""


@dataclass(frozen=True)
class Teacher:
    """A policy that a further run makes of a warm-started one; cached like that one."""

    start: WarmStart = WarmStart()
    configs: Sequence[str] = ("configs/quickstart.yaml",)
    overrides: Overrides = field(default_factory=dict)
    seed: int = 1


@dataclass(frozen=True)
class Arm:
    """One way to train: configuration files over the claim's own, and single values over those."""

    name: str
    configs: Sequence[str] = ()
    overrides: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number of a finished run, and which direction is good. ``counts``: it is 1 or 0, and runs are counted."""

    label: str
    read: Read
    better: Literal["higher", "lower"]
    counts: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence that runs over several seeds can support or refute.

    Attributes:
        name: file name of the results.
        title: heading.
        sentence: what is claimed, as the paper or card claims it.
        source: the paper.
        warm_start: the policy that all arms start from.
        configs: files that all arms share.
        overrides: single values that all arms share.
        arms: the first is the baseline.
        metrics: what is compared.
        curves: logged names to plot against the clock.
        setup: what the task is and why it can show the effect, for the report.
        seeds: paired over the arms.
        teacher: made before the first run; ``{teacher}`` in the value of an override stands for its folder.
        extra: writes further figures and text about the finished runs (see `report`).
        tried: designs that did not show the effect, and what came out.
    """

    name: str
    title: str
    sentence: str
    source: str
    arms: Sequence[Arm]
    metrics: Sequence[Metric]
    curves: Sequence[str]
    setup: str
    warm_start: WarmStart = WarmStart()
    configs: Sequence[str] = ("configs/quickstart.yaml",)
    overrides: Overrides = field(default_factory=dict)
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    teacher: Teacher | None = None
    extra: Callable[[Any], str] | None = None
    tried: Sequence[str] = ()


def fingerprint(configs: Sequence[str], *rest: Any) -> str:
    """Eight digits that change with the contents of the files or with anything else that decides a run."""
    texts = [Path(path).read_text() for path in configs]
    kept = [x for x in rest if x is not None]
    plain = [asdict(x) if is_dataclass(x) else dict(x) if isinstance(x, Mapping) else x for x in kept]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps([texts, plain], sort_keys=True, default=str).encode()).hexdigest()[:8]


@lru_cache(maxsize=256)
def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything that a run logged: name -> (clock, value) in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def series(run: Path, name: str) -> list[tuple[int, float]]:
    """One logged name; ``KeyError`` with what there is if it was never logged."""
    logged = scalars(run)
    if name not in logged:
        raise KeyError(f"{run} never logged {name!r}; it has {sorted(logged)}")
    return logged[name]


def at_end(name: str, over: int = 1) -> Read:
    """Mean of the last ``over`` logged values."""
    return lambda run: statistics.fmean(value for _, value in series(run, name)[-over:])


def total(name: str) -> Read:
    """Sum over the run: tokens, seconds."""
    return lambda run: sum(value for _, value in series(run, name))


def largest(name: str) -> Read:
    """The best value that was ever logged."""
    return lambda run: max(value for _, value in series(run, name))


def smallest(name: str) -> Read:
    """The worst value that was ever logged."""
    return lambda run: min(value for _, value in series(run, name))


def after(name: str, steps: int, clock: str | None = None) -> Read:
    """The last value when so many training steps were done, or ``steps`` of another logged counter, from 0 on.

    A run that goes back passes a step of such a counter more than once; what counts is the last time.
    """

    def read(run: Path) -> float:
        where = None if clock is None else dict(series(run, clock))
        return [v for c, v in series(run, name) if (c if where is None else where[c]) == steps - 1][-1]

    return read


def within(name: str, budget: float, cost: str, also: str | None = None) -> Read:
    """The last value that was had for ``budget``, the sum of ``cost`` and ``also`` until then (see `reached`)."""
    return lambda run: [v for c, v in series(run, name) if spent(run, c, cost, also) <= budget][-1]


def spent(run: Path, clock: int, cost: str, also: str | None) -> float:
    """Sum of one or two logged costs up to a step; the second is 0 in runs that never had it."""
    paid = series(run, cost) + (scalars(run).get(also, []) if also is not None else [])
    return sum(v for c, v in paid if c <= clock)


def collapsed(name: str) -> Read:
    """1 if the last logged value is below half of the best one, else 0."""
    return lambda run: float(series(run, name)[-1][1] < largest(name)(run) / 2)


def reached(
    name: str, value: float, cost: str | None = None, also: str | None = None, clock: str | None = None
) -> Read:
    """How much it took until ``name`` first reached ``value``. Infinity for a run that never got there.

    Args:
        name: logged name.
        value: the goal.
        cost: sum of this logged name until then, instead of training steps.
        also: a second cost to add, 0 in runs that never had it.
        clock: value of this logged name at that time, instead of training steps.
    """

    def read(run: Path) -> float:
        when = next((c for c, v in series(run, name) if v >= value), None)
        if when is None:
            return float("inf")
        if clock is not None:
            return [v for c, v in series(run, clock) if c <= when][-1]
        if cost is None:
            return float(when)
        return spent(run, when, cost, also)

    return read
