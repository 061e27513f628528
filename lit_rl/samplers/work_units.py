# SPDX-License-Identifier: Apache-2.0
"""A request divided among several workers: which rows go together, in which order, and how they come together again.

Sampling noise hangs on (seed, draw, sample, position) alone, so any division gives the same completions.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import Progress, RolloutRequest


class LengthEstimate:
    """How long completions are expected to be: as long as those of the same prompt were before, else as those of its
    source, else as their budget allows.

    Both are running means, over the times that a prompt was sampled and over batches.

    Args:
        weight: of the newest observation in a running mean.
        prompts: how many prompts are remembered; those not seen for longest are forgotten.
    """

    def __init__(self, weight: float = 0.5, prompts: int = 20_000) -> None:
        self.weight, self.prompts = weight, prompts
        self._by_prompt: OrderedDict[tuple[str, int], float] = OrderedDict()
        self._by_source: dict[str, float] = {}

    def update(self, rollouts: Rollouts) -> None:
        """Learn from completions; interrupted and failed ones tell nothing."""
        reason = rollouts.row["stop_reason"]
        whole = (reason != StopReason.ABORTED) & (reason != StopReason.ERROR)
        means = rollouts.group_mean(rollouts.lengths.float().masked_fill(~whole, math.nan)).tolist()
        sources: dict[str, list[float]] = {}
        for source, uid, mean in zip(rollouts.prompts.source, rollouts.prompts.uid.tolist(), means):
            if not math.isnan(mean):
                key = (source, uid)
                self._by_prompt[key] = self._mixed(self._by_prompt.pop(key, None), mean)
                sources.setdefault(source, []).append(mean)
        for source, values in sources.items():
            self._by_source[source] = self._mixed(self._by_source.get(source), sum(values) / len(values))
        while len(self._by_prompt) > self.prompts:
            self._by_prompt.popitem(last=False)

    def _mixed(self, old: float | None, new: float) -> float:
        return new if old is None else (1 - self.weight) * old + self.weight * new

    def state_dict(self) -> dict[str, Any]:
        """What is known, as tensors and plain values."""
        names = list(dict.fromkeys(source for source, _ in self._by_prompt))
        return {
            "sources": dict(self._by_source),
            "names": names,
            "source": torch.tensor([names.index(source) for source, _ in self._by_prompt], dtype=torch.long),
            "uid": torch.tensor([uid for _, uid in self._by_prompt], dtype=torch.long),
            "length": torch.tensor(list(self._by_prompt.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        keys = zip([state["names"][i] for i in state["source"].tolist()], state["uid"].tolist())
        self._by_prompt = OrderedDict(zip(keys, state["length"].tolist()))
        self._by_source = dict(state["sources"])

    def copy(self) -> LengthEstimate:
        """One that learns on its own from here."""
        twin = LengthEstimate(self.weight, self.prompts)
        twin._by_prompt, twin._by_source = self._by_prompt.copy(), dict(self._by_source)
        return twin

    def remaining(self, request: RolloutRequest) -> Tensor:
        """``[N]`` float: tokens that each row is expected to need yet.

        A prefix that is longer than the estimate counts with its whole budget.
        """
        prompts, n = request.prompts, len(request)
        known = [
            self._by_prompt.get((source, uid), self._by_source.get(source, math.inf))
            for source, uid in zip(prompts.source, prompts.uid.tolist())
        ]
        total = torch.tensor(known)[request.group.cpu()]
        budgets = (
            request.budgets.cpu() if request.budgets is not None else torch.full((n,), request.sampling.max_tokens)
        )
        done = torch.zeros(n) if request.prefix is None else request.prefix.lengths.cpu().float()
        total = torch.where(total <= done, math.inf, total).minimum(budgets.float())
        left = (total - done).clamp(min=0)
        return left if request.prefix is None else left.masked_fill(request.prefix.finished.cpu(), 0)


def divide(group: Tensor, expected: Tensor, pieces: int) -> list[Tensor]:
    """Rows in about ``pieces`` parts of equal size, those expected to be longest first.

    A group stays together unless it is larger than a part.

    Args:
        group: ``[N]`` int.
        expected: ``[N]`` tokens that a row is expected to need.
        pieces: parts wanted; there may be a few more, and fewer if there is not a row for each.

    Returns:
        Row numbers, ascending within a part; a single empty part if there are no rows.
    """
    if not len(group):
        return [torch.zeros(0, dtype=torch.long)]
    size = math.ceil(len(group) / max(1, pieces))
    order = torch.argsort(group, stable=True)
    members = order.split(torch.bincount(group)[group.unique()].tolist())
    ranked = sorted(members, key=lambda rows: -float(expected[rows].max()))  # stable
    parts: list[list[Tensor]] = [[]]
    room = size
    for rows in ranked:
        for piece in rows.split(size):
            if len(piece) > room:
                parts.append([])
                room = size
            parts[-1].append(piece)
            room -= len(piece)
    return [torch.cat(part).sort().values for part in parts if part]


def deal(parts: Sequence[Tensor], expected: Tensor, hands: int) -> list[Tensor]:
    """Parts dealt into at most ``hands`` shares with similar sums of expected tokens; empty shares are left out."""
    shares: list[list[Tensor]] = [[] for _ in range(hands)]
    loads = [(0.0, 0, hand) for hand in range(hands)]  # tokens, rows, whose
    for part in sorted(parts, key=lambda rows: -float(expected[rows].sum())):
        tokens, rows, hand = heapq.heappop(loads)
        shares[hand].append(part)
        heapq.heappush(loads, (tokens + float(expected[part].sum()), rows + len(part), hand))
    return [torch.cat(share).sort().values for share in shares if share]


def part_of(request: RolloutRequest, rows: Tensor) -> RolloutRequest:
    """The request for some of its rows, without what cannot travel to another process."""
    kept, group = torch.unique(request.group[rows], return_inverse=True)
    return replace(
        request,
        prompts=request.prompts.select(kept.tolist()),
        group=group,
        sample=request.sample[rows],
        budgets=None if request.budgets is None else request.budgets[rows],
        prefix=None if request.prefix is None else request.prefix.select(rows).to("cpu"),
        should_stop=None,
        score=None,
        wanted=None if request.wanted is None else len(kept),
        edits=[],
    )


def assemble(request: RolloutRequest, rows: Sequence[Tensor], parts: Sequence[Rollouts]) -> Rollouts:
    """The batch of a request from those of its parts.

    Args:
        request: what was asked for.
        rows: which rows of the request each part holds.
        parts: completions.

    Raises:
        ValueError: a row is missing or there twice.
    """
    where = torch.cat(list(rows))
    if not torch.equal(where.sort().values, torch.arange(len(request))) or len(where) != sum(len(p) for p in parts):
        raise ValueError("The parts do not hold each row of the request once.")
    merged = Rollouts.cat(list(parts)).select(torch.argsort(where))
    row = {**merged.row, "group": request.group.cpu().long(), "unit": torch.arange(len(request))}
    return replace(merged, prompts=request.prompts, row=row).trim()


def as_of(rollouts: Rollouts, finished: Tensor, lengths: Tensor) -> Rollouts:
    """A copy of a batch as it was when its rows had these lengths; those not finished then are interrupted.

    Args:
        rollouts: the batch.
        finished: ``[N]`` bool.
        lengths: ``[N]`` int.
    """
    out = rollouts.clone()
    inside = torch.arange(out.width) < lengths[:, None]
    for name, values in out.token.items():
        out.token[name] = torch.where(inside, values, torch.zeros_like(values))
    out.row["lengths"] = lengths.clone()
    out.row["finished"] = out.finished & finished
    out.row["stop_reason"] = torch.where(finished, out.row["stop_reason"], int(StopReason.ABORTED))
    return out


@dataclass
class Seen:
    """The progress of all rows of a request (see `Progress`)."""

    step: int
    finished: Tensor
    lengths: Tensor


State = tuple[Tensor, Tensor]  # finished and lengths of a share's rows


class Clock:
    """The decode steps of shares that are decoded side by side, as those of a single batch.

    After step s of the clock each share is where it was after its own step s, whenever that was; one that is through
    stays as it ended. What `RolloutRequest.should_stop` sees hangs neither on the number of workers nor on their speed.

    Args:
        shares: the rows of each share; together all N.
        lengths: ``[N]`` tokens of the rows before the first step.
    """

    def __init__(self, shares: Sequence[Tensor], lengths: Tensor) -> None:
        self.shares = list(shares)
        self.step = 0
        self.received = [0] * len(shares)  # steps of each share that are known
        self.states: list[State] = [(torch.zeros(len(rows), dtype=torch.bool), lengths[rows]) for rows in shares]
        self._ahead: list[deque[State]] = [deque() for _ in shares]
        self._ended: list[State | None] = [None] * len(shares)

    def add(self, share: int, first: int, steps: Sequence[State]) -> None:
        """States of a share after its steps ``first``, ``first + 1``, …; those that are known are skipped."""
        new = steps[max(0, self.received[share] - first) :]
        self._ahead[share].extend(new)
        self.received[share] += len(new)

    def end(self, share: int, lengths: Tensor) -> None:
        """A share is through, with these lengths."""
        self._ended[share] = (torch.ones(len(lengths), dtype=torch.bool), lengths)

    def advance(self, should_stop: Callable[[Progress], bool]) -> bool:
        """Go on as far as all shares are known to be; True as soon as ``should_stop`` is, which is asked each step."""
        while self._ready():
            for share, ahead in enumerate(self._ahead):
                if ahead:
                    self.states[share] = ahead.popleft()
                else:
                    self.states[share] = self._ended[share] or self.states[share]
            self.step += 1
            if should_stop(self._seen()):
                return True
        return False

    def _ready(self) -> bool:
        ready = all(ahead or ended is not None for ahead, ended in zip(self._ahead, self._ended))
        return ready and any(self._ahead)

    def _seen(self) -> Seen:
        n = sum(len(rows) for rows in self.shares)
        finished, lengths = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
        for rows, (done, tokens) in zip(self.shares, self.states):
            finished[rows], lengths[rows] = done, tokens
        return Seen(self.step, finished, lengths)
