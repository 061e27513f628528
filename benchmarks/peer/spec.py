# SPDX-License-Identifier: Apache-2.0
"""What both sides are given and what both give back. Imported in both environments: needs torch and nothing else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Spec:
    """A GRPO run.

    Attributes:
        policy: folder of the policy in hub format.
        prompts: jsonl file with ``prompt`` and ``answer``, in the order of training.
        steps: training steps.
        prompts_per_step: prompts of a step.
        group_size: completions of a prompt.
        max_tokens: budget of a completion.
        forced_length: no completion ends before its budget: lit-rl ignores the end-of-sequence token, TRL suppresses
            it.
        reward: ``"exact"``: the text after the last ``#`` is the answer; ``"spread"``: a number that differs from
            completion to completion, so that no group is without signal.
        learning_rate: of AdamW with betas 0.9 and 0.95, constant after ``warmup`` steps.
        warmup: steps of linear warm-up.
        precision: ``"fp32"``; ``"bf16"``: weights and arithmetic in bfloat16.
        batch: completions of one forward and backward pass of TRL (gradients are accumulated over them); lit-rl
            splits by tokens.
        device: ``"cpu"`` or ``"cuda"``.
        seed: of sampling.
        validation: jsonl file of held-out problems; None: no evaluation.
        evaluate_every: steps between evaluations.
        samples: completions of each held-out problem.
        stop_at: end the run once held-out pass@1 is at least this.
    """

    policy: str
    prompts: str
    steps: int
    prompts_per_step: int = 16
    group_size: int = 8
    max_tokens: int = 128
    forced_length: bool = False
    reward: str = "exact"
    learning_rate: float = 1e-6
    warmup: int = 0
    precision: str = "fp32"
    batch: int = 128
    device: str = "cpu"
    seed: int = 1
    validation: str | None = None
    evaluate_every: int = 20
    samples: int = 4
    stop_at: float | None = None

    def records(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]


@dataclass
class Outcome:
    """What a side measured. ``steps``: seconds, tokens and stages of each; ``evaluations``: held-out pass@1."""

    versions: dict[str, str]
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float = 0.0

    def save(self, path: str) -> None:
        self.peak_gib = peak_gib()
        Path(path).write_text(json.dumps(asdict(self)))


class Clock:
    """Wall time without what is done while it is paused."""

    def __init__(self) -> None:
        self.start, self.away = time.perf_counter(), 0.0

    def seconds(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self.start - self.away

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.away += time.perf_counter() - before


def peak_gib() -> float:
    """Most memory that this process has held: on the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith("VmHWM"):
            return int(entry.split()[1]) / 2**20
    return float("nan")


def exact(text: str, answer: str) -> float:
    """1 if the text after the last ``#`` is the answer."""
    _, marker, tail = text.rpartition("#")
    return float(bool(marker) and tail.strip() == answer)


def spread_reward(ids: Any, vocabulary: int) -> float:
    """Between 0 and 1, different for almost every completion."""
    return sum(int(i) for i in ids) / (max(len(ids), 1) * vocabulary)


def from_arguments() -> tuple[Spec, str]:
    """The spec and the output file that the process was started with."""
    return Spec(**json.loads(Path(sys.argv[1]).read_text())), sys.argv[2]
