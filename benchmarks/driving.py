# SPDX-License-Identifier: Apache-2.0
"""Drives samplers as training steps do, without a trainer: draw prompts, sample, score, count; and their memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer.spec import exact
from lit_rl.data import ListStream
from lit_rl.prompts import PromptEncoder
from lit_rl.rollouts import Prompts, Rollouts
from lit_rl.samplers import RolloutRequest, RolloutSampler, Sampling


@dataclass
class Sizes:
    """Of a step: N prompts, G completions of each, and the budget of a completion in tokens."""

    prompts: int = 16
    group_size: int = 8
    max_tokens: int = 128

    def __str__(self) -> str:
        return f"{self.prompts} prompts × {self.group_size} completions of at most {self.max_tokens} tokens"


class Stream:
    """Problems (``prompt`` and ``answer``) in the order of training, as prompts; they begin anew when they are used up.

    Args:
        tokenizer: the policy's.
        problems: the records.
    """

    def __init__(self, tokenizer: Any, problems: list[dict[str, Any]]) -> None:
        self.encoder, self.stream = PromptEncoder(tokenizer), ListStream(problems, shuffle=False)

    def at(self, cursor: int, count: int) -> Prompts:
        """The prompts of positions ``cursor`` to ``cursor + count``."""
        return self.encoder.encode(self.stream.at(cursor, count), list(range(cursor, cursor + count)))


class Score:
    """The quickstart's reward, as samplers that select get it; it counts what it has scored.

    Attributes:
        completions: scored since the last `take`.
        tokens: of these.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.completions, self.tokens = tokenizer, 0, 0

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        texts = self.tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True)
        answers = [rollouts.prompts.columns["answer"][g] for g in rollouts.group.tolist()]
        right = [exact(t, a) if f else 0.0 for t, a, f in zip(texts, answers, rollouts.finished.tolist())]
        rollouts.reward_terms["exact"] = torch.tensor(right, device=rollouts.device)
        rollouts.reward_weights["exact"] = torch.ones(len(right), device=rollouts.device)
        rollouts.correct = rollouts.reward_terms["exact"].clone()
        self.completions += len(rollouts)
        self.tokens += int(rollouts.lengths.sum())
        return rollouts

    def take(self) -> tuple[int, int]:
        """Completions and tokens that were scored, counted from here on anew."""
        found, self.completions, self.tokens = (self.completions, self.tokens), 0, 0
        return found


class Steps:
    """A sampler at work: each `next` is the sampling of one training step, weights frozen.

    Args:
        sampler: not set up yet.
        model: the policy.
        tokenizer: its tokenizer.
        problems: what the prompts are made of.
        sizes: of a step.
        clock: seconds so far, such as `time.perf_counter` or `tree_cpu_seconds`.
        seed: of the sampling noise.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        model: Any,
        tokenizer: Any,
        problems: list[dict[str, Any]],
        sizes: Sizes,
        clock: Callable[[], float] = time.perf_counter,
        seed: int = 0,
    ) -> None:
        self.sampler, self.model, self.sizes, self.clock, self.seed = sampler, model, sizes, clock, seed
        self.stream, self.score = Stream(tokenizer, problems), Score(tokenizer)
        self.cursor = self.version = 0
        self.last: Rollouts | None = None
        with sampler.active():
            sampler.setup(model, tokenizer)

    def sync(self) -> float:
        """Seconds until the sampler has been given the policy's weights, if it takes them at once."""
        start, self.version = self.clock(), self.version + 1
        self.sampler.sync(self.model, self.version)
        return self.clock() - start

    def late_sync(self) -> float:
        """Seconds of the last turn in which a sampler took weights that it only takes when it samples again."""
        assert self.last is not None
        return self.sampler.metrics(self.last).get("sync_seconds", 0.0)

    def next(self) -> Rollouts:
        """The completions of the next step."""
        count = self.sampler.prompts_to_draw(self.sizes.prompts)
        prompts = self.stream.at(self.cursor, count)
        self.cursor += count
        request = RolloutRequest.for_groups(
            prompts,
            self.sizes.group_size,
            Sampling(max_tokens=self.sizes.max_tokens),
            self.seed,
            wanted=self.sizes.prompts,
            score=self.score,
        )
        with self.sampler.active():
            self.last = self.sampler.sample(request)
        return self.last

    def finish(self) -> int:
        """Wait for what was sampled ahead and forget it; how many tokens that was."""
        self.sampler.state_dict()
        ahead = [batch.rollouts for batch in getattr(self.sampler, "batches", ())]
        if ahead:
            self.sampler.on_rewind(self.model)
        return sum(int(rollouts.lengths.sum()) for rollouts in ahead)

    def turn(self, steps: int) -> tuple[int, float]:
        """Tokens and seconds of some steps, with what was sampled ahead of the next one."""
        start = self.clock()
        tokens = sum(int(self.next().lengths.sum()) for _ in range(steps)) + self.finish()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return tokens, self.clock() - start


def tree_peak_bytes() -> int:
    """Peak resident memory of this process and of all that descend from it, added up."""
    return sum(_peak(pid) for pid in process_tree())


def tree_cpu_seconds() -> float:
    """Processor time that this process and all that descend from it have used; busy neighbours do not show in it."""
    mine = os.getpid()
    return time.process_time() + sum(_cpu_seconds(pid) for pid in process_tree() if pid != mine)


def process_tree() -> set[int]:
    """This process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
    tree = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak(pid: int) -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0
    return int(fields["VmHWM"].split()[0]) * 1024 if "VmHWM" in fields else 0
