# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole GRPO step: lit-rl and TRL's GRPOTrainer on the same model, prompts, group size and update.

    python benchmarks/trl_step.py                                # both sizes on the CPU
    python benchmarks/trl_step.py --sizes quickstart
    python benchmarks/trl_step.py --device cuda --sizes 0.5B     # bfloat16

A step is everything from one batch of completions to the next: generation, rewards, loss, gradient, optimizer, logging.
At the quickstart's size the policy is its warm-started one and lengths are what it samples; the learning rate is so
small (1e-6) that they stay so on both sides. The larger policies have random weights, and no completion of theirs ends
before its budget. Each side runs in a process of its own. TRL gets an environment of its own in ``.venv-trl``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, add_device, arguments, finish, hardware, median, spread
from benchmarks.peer.processes import run_side
from benchmarks.peer.spec import Outcome, Spec
from benchmarks.workloads import (
    addition_problems,
    digit_problems,
    matrix_flops,
    random_policy,
    warm_started_policy,
    write_jsonl,
)


@dataclass
class Size:
    """A workload: ``goal`` is how many times faster lit-rl should be; ``warm`` steps of a run are not counted."""

    spec: Spec
    title: str
    goal: float | None
    warm: int


@dataclass
class Measured:
    """The counted steps of all runs of a side."""

    versions: dict[str, str]
    steps: list[dict[str, float]]
    peak_gib: float


def size_of(name: str, options: argparse.Namespace) -> Size:
    """The named workload for the device at hand."""
    repeats = -(-options.repeats // options.rounds)
    if name == "quickstart":
        warm = 5
        steps = warm + repeats
        prompts = write_jsonl(addition_problems(16 * steps), "additions")
        spec = Spec(str(warm_started_policy()), str(prompts), steps=steps, device=options.device)
        return Size(spec, "Quickstart: 0.56M parameters, 16 prompts × 8 completions of at most 128 tokens", 3.0, warm)
    few = {"tiny": (2, 4, 16), "100M": (2, 4, 512), "0.5B": (16, 8, 512)}
    prompts_per_step, group, tokens = few[name]
    warm = 1
    steps = warm + (min(repeats, 3) if name == "100M" else repeats)
    prompts = write_jsonl(digit_problems(prompts_per_step * steps), "digits")
    spec = Spec(
        str(random_policy(name)),
        str(prompts),
        steps=steps,
        prompts_per_step=prompts_per_step,
        group_size=group,
        max_tokens=tokens,
        forced_length=True,
        reward="spread",
        device=options.device,
        precision="bf16" if name == "0.5B" else "fp32",
        batch=32 if name == "0.5B" else 128,
    )
    title = f"{name}: random weights, {prompts_per_step} prompts × {group} completions of exactly {tokens} tokens"
    return Size(spec, title, 1.3 if name == "100M" else None, warm)


def step_flops(spec: Spec, prompt_tokens: float, completion_tokens: float) -> float:
    """Work of a step that no implementation can avoid: each group's prompt and each completion forward once to be
    sampled, then once forward and twice that backward to be trained on."""
    token, pair = matrix_flops(Path(spec.policy))
    rows = spec.prompts_per_step * spec.group_size
    prompts = spec.prompts_per_step * prompt_tokens
    length = completion_tokens / rows
    pairs = completion_tokens * (prompt_tokens + length / 2)  # of a completion's token with what it attends to
    sampling = token * (prompts + completion_tokens) + pair * pairs
    training = 3 * (token * (rows * prompt_tokens + completion_tokens) + pair * pairs)
    return sampling + training


def product_rate(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product: what "100 %" means for the utilisation."""
    import time

    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    dtype = torch.bfloat16 if precision == "bf16" else dtype
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(size: Size, sides: list[str], rounds: int) -> dict[str, Measured]:
    """Run the sides in turn, so that a busy minute of the machine does not hit one of them alone."""
    outcomes: dict[str, list[Outcome]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides:
            outcomes[side].append(run_side(side, replace(size.spec, seed=turn + 1)))
    return {
        side: Measured(
            runs[0].versions, [s for run in runs for s in run.steps[size.warm :]], max(run.peak_gib for run in runs)
        )
        for side, runs in outcomes.items()
    }


def row_of(side: str, found: Measured, spec: Spec, rate: float) -> dict[str, Any]:
    """The medians of one side."""
    seconds = median([s["seconds"] for s in found.steps])
    tokens = median([s["tokens"] for s in found.steps])
    prompt_tokens = 32.0 if spec.forced_length else 7.0
    return {
        "": f"{side} {found.versions.get(side.lower(), '')}".strip(),
        "seconds a step": seconds,
        "range": spread([s["seconds"] for s in found.steps]),
        "generation": median([s["rollout"] for s in found.steps]),
        "update": median([s["update"] for s in found.steps]),
        "generated tokens": int(tokens),
        "tokens/s": int(tokens / seconds),
        "peak GiB": found.peak_gib,
        "utilisation %": 100 * step_flops(spec, prompt_tokens, tokens) / seconds / rate,
    }


def main() -> None:
    """Run both sides at each size."""
    parser = arguments(__doc__, repeats=15)
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", choices=["quickstart", "100M", "0.5B", "tiny"])
    parser.add_argument("--sides", nargs="+", choices=["lit-rl", "TRL"], default=["lit-rl", "TRL"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="instead of the size's own")
    parser.add_argument("--rounds", type=int, default=3, help="runs that the repeats are spread over, sides in turn")
    options = parser.parse_args()
    names = options.sizes or (["tiny"] if options.smoke else ["0.5B"] if options.device == "cuda" else None)
    report = Report(
        "trl_step",
        "A whole GRPO step against TRL",
        "Median seconds of a step with everything in it, same model, prompts, group size, lengths and update; TRL at "
        "its best setting on a CPU (one pass over the whole batch, no gradient checkpointing, float32). The sides run "
        f"in turn, {options.rounds} times. *Generation* and *update* are the two large parts of a step. Memory is the "
        "peak of the process. *Utilisation* is the arithmetic of a step that cannot be avoided, as a share of what a "
        "large matrix product does on this machine in the same time.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k != "json"},
    )
    for name in names or ["quickstart", "100M"]:
        size = size_of(name, options)
        spec = replace(size.spec, precision=options.precision or size.spec.precision)
        size = replace(size, spec=spec)
        rate = product_rate(options.device, spec.precision)
        found = measure(size, options.sides, options.rounds)
        rows = [row_of(side, one, spec, rate) for side, one in found.items()]
        counted = options.rounds * (spec.steps - size.warm)
        note = f"{spec.precision}; medians of {counted} steps; product {rate / 1e9:.0f} GFLOP/s"
        report.tables.append(Table(f"{size.title} ({note})", rows))
        if size.goal and {"lit-rl", "TRL"} <= set(found):
            seconds = dict(zip(found, (row["seconds a step"] for row in rows)))
            ratio = seconds["TRL"] / seconds["lit-rl"]
            report.goals.append(Goal(f"times faster than TRL, {name}", ratio, "at least", size.goal))
    finish(report, options)


if __name__ == "__main__":
    main()
