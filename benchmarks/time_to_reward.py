# SPDX-License-Identifier: Apache-2.0
"""Seconds of GRPO until held-out pass@1 is 0.90: lit-rl and TRL from the same warm-started policy, on the quickstart.

    python benchmarks/time_to_reward.py
    python benchmarks/time_to_reward.py --seeds 1 2 3 --trl-seeds 1

Both have the quickstart's settings (16 prompts × 8 completions, AdamW at 2e-4, clip 0.2, group-normalised rewards,
token mean, one update a batch) and draw the same problems. Every ten steps both sample four completions of each of 256
held-out problems, as in training; that time is not counted. The run ends at the first evaluation that reaches the goal.
Runs are repeated with other seeds of sampling; a median is over them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, arguments, finish, hardware, median
from benchmarks.peer.processes import run_side
from benchmarks.peer.spec import Outcome, Spec
from benchmarks.workloads import addition_problems, random_policy, warm_started_policy, write_jsonl


def spec_of(smoke: bool, steps: int, target: float) -> Spec:
    """The quickstart's settings; the smoke test takes a policy that nobody trained."""
    policy = random_policy("tiny") if smoke else warm_started_policy()
    steps, held_out = (2, 4) if smoke else (steps, 256)
    return Spec(
        str(policy),
        str(write_jsonl(addition_problems(16 * steps), "additions-to-reward")),
        steps=steps,
        prompts_per_step=2 if smoke else 16,
        max_tokens=8 if smoke else 128,
        learning_rate=2e-4,
        warmup=5,
        validation=str(write_jsonl(addition_problems(held_out, held_out=True), "additions-held-out")),
        evaluate_every=1 if smoke else 10,
        stop_at=target,
    )


def reached(outcome: Outcome, target: float) -> dict[str, Any]:
    """Seconds and steps to the target (None if it was not reached), and what the run looked like."""
    hit = next((e for e in outcome.evaluations if e["pass@1"] >= target), None)
    return {
        "seconds": None if hit is None else hit["at"],
        "steps": None if hit is None else int(hit["step"]),
        "seconds a step": median([s["seconds"] for s in outcome.steps]),
        "generated tokens": int(sum(s["tokens"] for s in outcome.steps)),
        "pass@1 at the start": outcome.evaluations[0]["pass@1"],
        "pass@1 at the end": outcome.evaluations[-1]["pass@1"],
        "peak GiB": outcome.peak_gib,
    }


def curve(outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """Held-out pass@1 after equal numbers of steps, with the seconds that each side took to get there."""
    rows: dict[int, dict[str, Any]] = {}
    for side, outcome in outcomes.items():
        for e in outcome.evaluations:
            row = rows.setdefault(int(e["step"]), {"step": int(e["step"])})
            row |= {f"{side}: seconds": e["at"], f"{side}: pass@1": e["pass@1"]}
    return [rows[step] for step in sorted(rows)]


def main() -> None:
    """Run both sides to the goal."""
    parser = arguments(__doc__)
    parser.add_argument("--target", type=float, default=0.9, help="held-out pass@1 to be reached")
    parser.add_argument("--steps", type=int, default=400, help="give up after so many steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of lit-rl's runs")
    parser.add_argument("--trl-seeds", type=int, nargs="*", default=[1], help="seeds of TRL's runs, which take longer")
    options = parser.parse_args()
    if options.smoke:
        options.seeds = options.trl_seeds = [1]
    spec = spec_of(options.smoke, options.steps, options.target)
    rows, first, seconds = [], {}, {}
    for side, seeds in (("lit-rl", options.seeds), ("TRL", options.trl_seeds)):
        found = []
        for seed in seeds:
            outcome = run_side(side, replace(spec, seed=seed))
            first.setdefault(side, outcome)
            found.append(reached(outcome, options.target))
            rows.append({"": side, "seed": seed, **found[-1]})
            print(rows[-1], file=sys.stderr, flush=True)
        times = [f["seconds"] for f in found]
        seconds[side] = median(times) if times and None not in times else None
    report = Report(
        "time_to_reward",
        "Time to reward against TRL",
        f"Seconds of training until held-out pass@1 reaches {options.target:g}, from the same warm-started policy with "
        "the same settings. Evaluation and start-up are not counted.",
        hardware(),
        {k: v for k, v in vars(options).items() if k != "json"},
        [Table("Runs", rows), Table("Learning curves of the first seeds", curve(first))],
    )
    ours, theirs = seconds["lit-rl"], seconds.get("TRL")
    share = ours / theirs if ours is not None and theirs else None
    report.goals.append(Goal("lit-rl's seconds as a share of TRL's", share, "at most", 1 / 3))
    finish(report, options)


if __name__ == "__main__":
    main()
