# SPDX-License-Identifier: Apache-2.0
"""What synchronous, partial and asynchronous rollouts are expected to cost, from one engine to a thousand.

    python benchmarks/simulate_rollouts.py
    python benchmarks/simulate_rollouts.py --lengths runs/quickstart/grpo/rollouts --train-seconds 12
    python benchmarks/simulate_rollouts.py --check          # also against real runs of a small policy

Speeds are arguments: measure a decode step of your engine at two batch sizes, an update and a weight sync, and read the
lengths from the files of `RolloutLogger`. The batch grows with the engines (``--groups-per-engine``), unless
``--groups`` fixes it. The first table compares the schedules, the second values of M / N for partial rollouts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Report, Table, arguments, finish, hardware
from benchmarks.rollout_simulator import SCHEDULES, Cluster, Group, Lengths, Setup, generate, long_tailed, partial


def logged(path: Path, group_size: int, seed: int = 0) -> Lengths:
    """Lengths of a logged run: each group of the simulation is a group of the run, drawn at random with replacement.

    Args:
        path: a jsonl file of `RolloutLogger`, or the folder of several.
        group_size: completions of a group; a logged group is cut or repeated to that.
        seed: decides which groups are drawn.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    groups: dict[tuple[str, int], list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            groups.setdefault((file.name, row["group"]), []).append(max(1, int(row["lengths"])))
    if not groups:
        raise SystemExit(f"There are no logged completions in {path}: give a file or folder written by RolloutLogger.")
    known = list(groups.values())

    def lengths(number: int) -> list[int]:
        group = random.Random(f"{seed}/{number}").choice(known)
        return [group[i % len(group)] for i in range(group_size)]

    return lengths


def compare(setups: Iterable[Setup], lengths: Lengths, steps: int) -> Table:
    """The schedules side by side."""
    rows: list[dict[str, Any]] = []
    for here in setups:
        first = 0.0
        for name, schedule in SCHEDULES.items():
            outcome = schedule(here, lengths, steps, warm_up=steps)
            first = first or outcome.tokens / outcome.seconds
            speed = {"trained tokens/s": outcome.tokens / outcome.seconds}
            speed["speed-up"] = speed["trained tokens/s"] / first
            rows.append({"engines": here.engines, "groups": here.groups, "schedule": name, **outcome.row(), **speed})
    return Table("Schedules", rows)


def vary_oversampling(setup: Setup, lengths: Lengths, ratios: Iterable[float], steps: int) -> Table:
    """Partial rollouts over M / N."""
    rows = []
    for ratio in ratios:
        outcome = partial(replace(setup, oversampling=ratio), lengths, steps, warm_up=steps)
        rows.append({"M / N": ratio, **outcome.row(), "trained tokens/s": outcome.tokens / outcome.seconds})
    return Table(f"Partial rollouts, {setup.engines} engines, {setup.groups} groups", rows)


# Against real runs ---------------------------------------------------------------------------------------------------


def check(rounds: int, groups: int, group_size: int, max_tokens: int) -> Table:
    """Decode steps and seconds of a small policy, measured, and simulated from its own lengths and its own speed."""
    import torch

    from lit_rl.policies import build_small_model
    from lit_rl.samplers import HFSampler, PartialSampler, RolloutRequest, Sampling
    from lit_rl.tokenizers import build_character_tokenizer

    tokenizer = build_character_tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_small_model(vocab_size=len(tokenizer), **ids)
    watch, runs = Watch(), {}

    def request(first: int, count: int, wanted: int | None) -> Any:
        prompts, sampling = make_prompts(tokenizer, first, count), Sampling(max_tokens=max_tokens)
        return RolloutRequest.for_groups(prompts, group_size, sampling, 0, wanted=wanted, should_stop=watch)

    def connected(sampler: Any) -> Any:
        sampler.setup(model, tokenizer)
        sampler.sync(model, 0)
        return sampler

    plain = connected(HFSampler(max_rows=10**6))
    known = plain.sample(request(0, 2 * groups * rounds, None)).lengths.view(-1, group_size).tolist()
    watch.gaps.clear()  # that was the warm-up
    for name, ratio in (("synchronous", 1.0), ("partial", 2.0)):
        sampler = connected(PartialSampler(HFSampler(max_rows=10**6), oversampling=ratio))
        watch.steps, began, cursor = 0, time.perf_counter(), 0
        for _ in range(rounds):
            count = sampler.prompts_to_draw(groups)
            sampler.sample(request(cursor, count, groups))
            cursor += count
        runs[name] = ratio, watch.steps, time.perf_counter() - began
    base = Setup(slots=10**6, groups=groups, train_seconds=0, sync_seconds=0)
    speeds = dict(zip(("token_seconds", "row_seconds"), watch.speed()))
    rows = []
    for name, (ratio, steps, seconds) in runs.items():
        here = replace(base, oversampling=ratio)
        ticks = simulated(replace(here, token_seconds=1.0), known, rounds)
        expected = simulated(replace(here, **speeds), known, rounds)
        row = {"schedule": name, "decode steps": steps, "simulated steps": round(ticks)}
        rows.append({**row, "seconds": seconds, "simulated seconds": expected})
    return Table(f"{rounds} steps of {groups} groups of {group_size}, up to {max_tokens} tokens, frozen weights", rows)


class Watch:
    """A ``should_stop`` that counts decode steps and times them."""

    def __init__(self) -> None:
        self.steps = 0
        self.gaps: list[tuple[int, float]] = []  # (rows in the batch, seconds of the step)
        self._last: tuple[float, int] | None = None

    def __call__(self, progress: Any) -> bool:
        now, rows = time.perf_counter(), int((~progress.finished).sum())
        if progress.step > 1 and self._last is not None:
            self.gaps.append((self._last[1], now - self._last[0]))
        self._last = now, rows
        self.steps += 1
        return False

    def speed(self) -> tuple[float, float]:
        """Seconds of a decode step with an empty batch, and what a row adds: the line through all steps."""
        if len({rows for rows, _ in self.gaps}) < 2:
            return max((seconds for _, seconds in self.gaps), default=1e-3), 0.0
        line = statistics.linear_regression(*zip(*self.gaps))
        return max(line.intercept, 1e-5), max(line.slope, 0.0)


def simulated(setup: Setup, known: list[list[int]], rounds: int) -> float:
    """Seconds of generation of the first ``rounds`` steps with these lengths."""
    cluster, size = Cluster(setup), round(setup.oversampling * setup.groups)
    buffer: list[Group] = []
    drawn = 0
    for step in range(rounds):
        fresh = size - len(buffer)
        pool = buffer + [Group.new(drawn + i, lambda n: known[n]) for i in range(fresh)]
        drawn += fresh
        chosen = {id(g) for g in generate(cluster, pool, setup.groups, step)[: setup.groups]}
        buffer = [g for g in pool if id(g) not in chosen]
    return cluster.now


def make_prompts(tokenizer: Any, first: int, count: int) -> Any:
    """Additions, drawn at positions ``first``, ``first + 1``, …"""
    import torch

    from lit_rl.rollouts import Prompts

    texts = [
        f"{random.Random(d).randint(10, 99)}+{random.Random(-d).randint(10, 99)}=" for d in range(first, first + count)
    ]
    draw = torch.arange(first, first + count)
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    return Prompts(ids=ids, text=texts, uid=draw, draw=draw, source=["additions"] * count)


def main() -> None:
    """Simulate, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 8, 64, 1000])
    parser.add_argument("--groups", type=int, help="N, groups of a step, whatever the engines")
    parser.add_argument("--groups-per-engine", type=int, default=4, help="N / E, if --groups is not given")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--oversampling", type=float, default=2.0, help="M / N of partial rollouts")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 1.25, 1.5, 2, 3, 4], help="M / N to compare")
    parser.add_argument("--staleness", type=int, default=1, help="steps that asynchronous rollouts are ahead")
    parser.add_argument("--slots", type=int, default=64, help="completions that an engine decodes at once")
    parser.add_argument("--token-seconds", type=float, default=0.02, help="decode step with an empty batch")
    parser.add_argument("--row-seconds", type=float, default=0.0002, help="what each completion adds to it")
    parser.add_argument("--prefill-rate", type=float, default=20000.0, help="context tokens a second")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--train-seconds", type=float, default=30.0)
    parser.add_argument("--sync-seconds", type=float, default=2.0)
    parser.add_argument("--lengths", type=Path, help="files of RolloutLogger; default: a long-tailed law")
    parser.add_argument("--mean", type=float, default=2000.0, help="mean length of the law, in tokens")
    parser.add_argument("--between", type=float, default=0.6, help="spread of log-lengths between prompts")
    parser.add_argument("--within", type=float, default=0.5, help="spread of log-lengths within a prompt")
    parser.add_argument("--limit", type=int, default=16384, help="budget of a completion")
    parser.add_argument("--steps", type=int, default=20, help="steps that are averaged; as many warm up")
    parser.add_argument("--check", action="store_true", help="compare with real runs of a small policy")
    options = parser.parse_args()
    if options.smoke:
        options.engines, options.steps, options.ratios = [1, 2], 4, [1, 2]
    names = ("slots", "token_seconds", "row_seconds", "prefill_rate", "prompt_tokens", "oversampling", "staleness")
    names += ("train_seconds", "sync_seconds")
    setup = Setup(**{name: getattr(options, name) for name in names})
    if options.lengths:
        lengths = logged(options.lengths, options.group_size)
    else:
        lengths = long_tailed(options.mean, options.between, options.within, options.limit, options.group_size)
    per_engine = options.groups_per_engine
    setups = [replace(setup, engines=e, groups=options.groups or per_engine * e) for e in options.engines]
    middle = min(setups, key=lambda s: abs(s.engines - 8))
    tables = [
        compare(setups, lengths, options.steps),
        vary_oversampling(middle, lengths, options.ratios, options.steps),
    ]
    text = "Simulated, not measured: a prediction from the speeds and lengths in the settings."
    where = "No hardware"
    if options.check or options.smoke:
        tables.append(check(2, 2, 2, 16) if options.smoke else check(8, 8, 4, 256))
        where, text = hardware(), f"{text} The last table compares it with real runs."
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
    finish(Report("simulate_rollouts", "Rollout schedules, simulated", text, where, settings, tables), options)


if __name__ == "__main__":
    main()
