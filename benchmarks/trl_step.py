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
    """A workload: ``goal`` is how many times faster lit-rl should be; ``warm`` steps are not counted."""

    spec: Spec
    title: str
    goal: float | None
    warm: int


def size_of(name: str, options: argparse.Namespace) -> Size:
    """The named workload for the device at hand."""
    if name == "quickstart":
        warm = 5
        steps = warm + options.repeats
        prompts = write_jsonl(addition_problems(16 * steps), "additions")
        spec = Spec(str(warm_started_policy()), str(prompts), steps=steps, device=options.device)
        return Size(spec, "Quickstart: 0.56M parameters, 16 prompts × 8 completions of at most 128 tokens", 3.0, warm)
    few = {"tiny": (2, 4, 16), "100M": (2, 4, 512), "0.5B": (16, 8, 512)}
    prompts_per_step, group, tokens = few[name]
    warm, repeats = 1, max(5, options.repeats // 3) if name == "100M" else options.repeats
    steps = warm + repeats
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


def row_of(side: str, outcome: Outcome, size: Size, rate: float) -> dict[str, Any]:
    """The medians of one side."""
    steps = outcome.steps[size.warm :]
    seconds = median([s["seconds"] for s in steps])
    tokens = median([s["tokens"] for s in steps])
    prompt_tokens = 32.0 if size.spec.forced_length else 7.0
    return {
        "": f"{side} {outcome.versions.get(side.lower(), '')}".strip(),
        "seconds a step": seconds,
        "range": spread([s["seconds"] for s in steps]),
        "generation": median([s["rollout"] for s in steps]),
        "update": median([s["update"] for s in steps]),
        "generated tokens": int(tokens),
        "tokens/s": int(tokens / seconds),
        "peak GiB": outcome.peak_gib,
        "utilisation %": 100 * step_flops(size.spec, prompt_tokens, tokens) / seconds / rate,
    }


def main() -> None:
    """Run both sides at each size."""
    parser = arguments(__doc__, repeats=15)
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", choices=["quickstart", "100M", "0.5B", "tiny"])
    parser.add_argument("--sides", nargs="+", choices=["lit-rl", "TRL"], default=["lit-rl", "TRL"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="instead of the size's own")
    options = parser.parse_args()
    names = options.sizes or (["tiny"] if options.smoke else ["0.5B"] if options.device == "cuda" else None)
    report = Report(
        "trl_step",
        "A whole GRPO step against TRL",
        "Median seconds of a step with everything in it, same model, prompts, group size, lengths and update; TRL at "
        "its best setting on a CPU (one pass over the whole batch, no gradient checkpointing, float32). *Generation* "
        "and *update* are the two large parts of a step. Memory is the peak of the process. *Utilisation* is the "
        "arithmetic of a step that cannot be avoided, as a share of what a large matrix product does on this machine "
        "in the same time.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k != "json"},
    )
    for name in names or ["quickstart", "100M"]:
        size = size_of(name, options)
        if options.precision:
            size = replace(size, spec=replace(size.spec, precision=options.precision))
        rate = product_rate(options.device, size.spec.precision)
        outcomes = {side: run_side(side, size.spec) for side in options.sides}
        rows = [row_of(side, outcome, size, rate) for side, outcome in outcomes.items()]
        note = (
            f"{size.spec.precision}; medians of {size.spec.steps - size.warm} steps; product {rate / 1e9:.0f} GFLOP/s"
        )
        report.tables.append(Table(f"{size.title} ({note})", rows))
        if size.goal and len(rows) == 2:
            ratio = rows[1]["seconds a step"] / rows[0]["seconds a step"]
            report.goals.append(Goal(f"times faster than TRL, {name}", ratio, "at least", size.goal))
    finish(report, options)


if __name__ == "__main__":
    main()
