# SPDX-License-Identifier: Apache-2.0
"""A sampler whose completions are written down in advance: one token a tick for every row, as many as the test says."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch

from lit_rl.rollouts import Prompts, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling


class ScriptedSampler(RolloutSampler):
    """Token ``i`` of a row is ``1 + i`` and was drawn with probability 1 / (2 + policy version).

    Args:
        length: completion length of (draw, sample); the last token ends it.
    """

    def __init__(self, length: Callable[[int, int], int]) -> None:
        self.length = length
        self.requests: list[RolloutRequest] = []
        self.ticks = 0
        self.generated = 0

    def submit(self, request: RolloutRequest) -> None:
        self.requests.append(request)

    def collect(self) -> Rollouts:
        request = self.requests[-1]
        n = len(request)
        draws, samples = request.prompts.draw[request.group].tolist(), request.sample.tolist()
        start = request.prefix.lengths.tolist() if request.prefix is not None else [0] * n
        budgets = request.budgets.tolist() if request.budgets is not None else [request.sampling.max_tokens] * n
        assert all(s < b for s, b in zip(start, budgets)), "a row without budget must not be requested"
        ends = [min(self.length(d, s), b) for d, s, b in zip(draws, samples, budgets)]
        lengths = list(start)
        for tick in range(1, 1 + max(e - s for e, s in zip(ends, start))):
            self.ticks += 1
            grown = [min(x + 1, e) for x, e in zip(lengths, ends)]
            self.generated += sum(grown) - sum(lengths)
            lengths = grown
            seen = SimpleNamespace(
                step=tick, finished=torch.tensor([x == e for x, e in zip(lengths, ends)]), lengths=torch.tensor(lengths)
            )
            if request.should_stop is not None and request.should_stop(seen):
                break
        return self.build(request, draws, samples, start, lengths, budgets)

    def build(self, request, draws, samples, start, lengths, budgets) -> Rollouts:
        reasons = [
            StopReason.END if x == self.length(d, s) else StopReason.LENGTH if x == b else StopReason.ABORTED
            for x, d, s, b in zip(lengths, draws, samples, budgets)
        ]
        out = Rollouts.build(
            request.prompts,
            request.group,
            [torch.arange(1, 1 + x) for x in lengths],
            sampler_logprobs=[torch.full((x,), -math.log(2 + self.policy_version)) for x in lengths],
            stop_reason=torch.tensor([int(r) for r in reasons]),
            sample=request.sample,
            policy_version=self.policy_version,
        )
        for i, s in enumerate(start):
            for name in ("policy_version", "logprobs.sampler", "loss_weights"):
                if s:
                    out.token[name][i, :s] = request.prefix.token[name][i, :s]
        return out


def prompts_at(first: int, count: int) -> Prompts:
    """Prompts drawn at positions ``first … first + count - 1`` of a stream."""
    draws = range(first, first + count)
    return Prompts(
        ids=[torch.tensor([1 + d % 5, 2]) for d in draws],
        text=[f"prompt {d}" for d in draws],
        uid=torch.tensor([100 + d for d in draws], dtype=torch.long),
        draw=torch.tensor(list(draws), dtype=torch.long),
        source=["test"] * count,
        columns={"answer": [str(d) for d in draws]},
    )


class Steps:
    """Training steps around a sampler, without a trainer: draw, sample, new weights.

    Args:
        sampler: the sampler under test.
        group_size: completions of each prompt.
        max_tokens: budget of a completion.
    """

    def __init__(self, sampler: RolloutSampler, group_size: int = 1, max_tokens: int = 100, **request) -> None:
        self.sampler, self.group_size, self.extra = sampler, group_size, request
        self.sampling = Sampling(max_tokens=max_tokens)
        self.cursor = self.version = 0

    def request(self, wanted: int) -> RolloutRequest:
        count = self.sampler.prompts_to_draw(wanted)
        prompts = prompts_at(self.cursor, count)
        self.cursor += count
        return RolloutRequest.for_groups(prompts, self.group_size, self.sampling, 7, wanted=wanted, **self.extra)

    def step(self, wanted: int, model: torch.nn.Module | None = None) -> Rollouts:
        rollouts = self.sampler.sample(self.request(wanted))
        self.version += 1
        self.sampler.sync(model, self.version)
        return rollouts
