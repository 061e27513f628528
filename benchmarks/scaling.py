# SPDX-License-Identifier: Apache-2.0
"""How a step's cost grows with the number of groups and with the tokens of a completion.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --device cuda

Random weights, so that every completion has the same forced length and no group is without signal. The exponent is the
slope of seconds over size, both as logarithms: 1 is linear; fixed costs push it below 1, attention above.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, add_device, arguments, finish, hardware, median
from benchmarks.peer.processes import run_side
from benchmarks.peer.spec import Spec
from benchmarks.workloads import digit_problems, random_policy, write_jsonl

WARM = 2


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the line through the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(s) for s in seconds]).slope


def measure(spec: Spec, name: str, sizes: list[int]) -> tuple[list[dict[str, Any]], float]:
    """Rows of a table over one field of the spec, and the exponent."""
    rows, seconds = [], []
    for size in sizes:
        steps = run_side("lit-rl", replace(spec, **{name: size})).steps[WARM:]
        seconds.append(median([s["seconds"] for s in steps]))
        tokens = median([s["tokens"] for s in steps])
        row = {name.replace("_", " "): size, "seconds a step": seconds[-1]}
        row |= {stage: median([s[stage] for s in steps]) for stage in ("rollout", "update")}
        rows.append({**row, "µs a token": 1e6 * seconds[-1] / tokens, "of the first": seconds[-1] / seconds[0]})
    return rows, exponent(sizes, seconds)


def main() -> None:
    """Vary groups, then tokens."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16, 32], help="prompts of a step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256], help="tokens of a completion")
    options = parser.parse_args()
    shape, precision = ("0.5B", "bf16") if options.device == "cuda" else ("0.56M", "fp32")
    if options.smoke:
        shape, options.groups, options.tokens = "tiny", [1, 2], [4, 8]
    steps = WARM + options.repeats
    problems = write_jsonl(digit_problems(max(options.groups) * steps, tokens=8), "digits-8")
    spec = Spec(
        str(random_policy(shape)),
        str(problems),
        steps=steps,
        prompts_per_step=options.groups[len(options.groups) // 2],
        max_tokens=options.tokens[len(options.tokens) // 2],
        forced_length=True,
        reward="spread",
        device=options.device,
        precision=precision,
    )
    report = Report(
        "scaling",
        "Cost over groups and tokens",
        f"A policy of {shape} parameters, groups of 8, completions of forced length, {precision}; medians of "
        f"{options.repeats} steps. Attention to earlier tokens grows with the square of the length, and in a policy "
        "this small it is a visible part of a step.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k != "json"},
    )
    variations = {"prompts_per_step": (options.groups, "groups"), "max_tokens": (options.tokens, "tokens")}
    for name, (sizes, label) in variations.items():
        rows, slope = measure(spec, name, sizes)
        fixed = f"{spec.max_tokens} tokens" if label == "groups" else f"{spec.prompts_per_step} groups"
        report.tables.append(Table(f"Over {label}, {fixed}", rows))
        report.goals.append(Goal(f"exponent over {label}", slope, "at most", 1.1))
    finish(report, options)


if __name__ == "__main__":
    main()
