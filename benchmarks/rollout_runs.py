# SPDX-License-Identifier: Apache-2.0
"""Short GRPO runs that differ in their sampler, each in a process of its own with its own number of threads."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import median
from benchmarks.peer import ours
from benchmarks.peer.spec import Outcome, Spec, from_arguments
from benchmarks.rollout_simulator import Lengths, long_tailed
from lit_rl.hooks import RolloutCallback
from lit_rl.samplers import AsyncSampler, HFSampler, PartialSampler, RolloutRequest, RolloutSampler


@dataclass
class Variant:
    """How completions are sampled in a run.

    Attributes:
        name: in the tables.
        sampler: ``"plain"``, ``"partial"`` or ``"async"``.
        threads: torch's threads in the training process.
        options: arguments of the sampler.
        lengths: name (`LAWS`) and arguments of a law: every completion is as long as this says, whatever the policy
            wants; None: the policy ends its completions.
    """

    name: str
    sampler: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, Any] | None = None


def pareto(smallest: int, exponent: float, limit: int, group_size: int, seed: int = 0) -> Lengths:
    """Lengths of which a share of (smallest / t)^exponent is longer than t tokens, cut at a budget."""

    def lengths(group: int) -> list[int]:
        rng = random.Random(f"{seed}/{group}")
        return [min(limit, round(smallest * rng.paretovariate(exponent))) for _ in range(group_size)]

    return lengths


LAWS: dict[str, Any] = {"log-normal": long_tailed, "Pareto": pareto}


class ForcedLengths(RolloutCallback):
    """Gives each completion the budget that a law says; the sampler must ignore the end-of-sequence token.

    Args:
        law: ``name``, and the law's arguments without the group size.
        group_size: completions of a prompt.
    """

    def __init__(self, law: dict[str, Any], group_size: int) -> None:
        rest = {key: value for key, value in law.items() if key != "name"}
        self.lengths: Lengths = LAWS[law["name"]](**rest, group_size=group_size)

    def on_rollout_request(self, trainer: Any, module: Any, request: RolloutRequest) -> None:
        groups = [self.lengths(draw) for draw in request.prompts.draw.tolist()]
        rows = zip(request.group.tolist(), request.sample.tolist())
        request.budgets = torch.tensor([groups[g][s] for g, s in rows], dtype=torch.long)


def sampler_of(variant: Variant) -> RolloutSampler:
    """The sampler that a variant names."""
    inner = ours.EndlessSampler(max_rows=1024) if variant.lengths else HFSampler(max_rows=1024)
    if variant.sampler == "plain":
        return inner
    kinds: dict[str, Any] = {"partial": PartialSampler, "async": AsyncSampler}
    return kinds[variant.sampler](inner, **variant.options)


def train(spec: Spec, variant: Variant) -> Outcome:
    """Run GRPO in this process."""
    callbacks = [] if variant.lengths is None else [ForcedLengths(variant.lengths, spec.group_size)]
    return ours.run(spec, sampler_of(variant), callbacks)


def in_process_of_its_own(spec: Spec, variant: Variant) -> Outcome:
    """`train` in a fresh interpreter.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(variant.threads)}
    with tempfile.TemporaryDirectory() as folder:
        given, measured = Path(folder) / "spec.json", Path(folder) / "outcome.json"
        given.write_text(json.dumps(asdict(spec)))
        command = [sys.executable, __file__, str(given), str(measured), json.dumps(asdict(variant))]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise RuntimeError(f"{variant.name} failed:\n{(process.stdout + process.stderr)[-3000:]}")
        return Outcome(**json.loads(measured.read_text()))


def measure(spec: Spec, variants: list[Variant], rounds: int, warm: int) -> dict[str, dict[str, float]]:
    """Medians of the steps of each variant; the variants run in turn, ``rounds`` times, ``warm`` steps left out.

    Returns:
        For each variant: ``seconds`` of a step, of its ``rollout`` and of its ``train`` part (all the rest); mean
        ``tokens`` and ``processor`` seconds of a step (those of the training process); ``completions/s`` over all
        steps, and ``completions/processor second``; the number of ``steps``; means of the sampler's numbers.
    """
    steps: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    for turn in range(rounds):
        for variant in variants:
            steps[variant.name] += in_process_of_its_own(_seeded(spec, turn), variant).steps[warm:]
    rows = spec.prompts_per_step * spec.group_size
    found = {}
    for name, taken in steps.items():
        total = sum(s["seconds"] for s in taken)
        numbers = {key for s in taken for key in s if key.startswith("sampler/")}
        found[name] = {
            "seconds": median([s["seconds"] for s in taken]),
            "rollout": median([s["rollout"] for s in taken]),
            "train": median([s["seconds"] - s["rollout"] for s in taken]),
            "tokens": sum(s["tokens"] for s in taken) / len(taken),
            "processor": sum(s["processor"] for s in taken) / len(taken),
            "completions/s": rows * len(taken) / total,
            "completions/processor second": rows * len(taken) / sum(s["processor"] for s in taken),
            "steps": len(taken),
            **{key: sum(s.get(key, 0.0) for s in taken) / len(taken) for key in sorted(numbers)},
        }
    return found


def _seeded(spec: Spec, turn: int) -> Spec:
    return Spec(**{**asdict(spec), "seed": turn + 1})


if __name__ == "__main__":
    spec, target = from_arguments()
    train(spec, Variant(**json.loads(sys.argv[3]))).save(target)
