# SPDX-License-Identifier: Apache-2.0
"""The guide of NPO: a later policy's verified completions, and the slot that they take in earlier groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.callbacks.signal import verdicts
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.samplers.base import RolloutRequest
from lit_rl.seeding import mix_seeds

ISMode = Literal["on_policy", "exact"]
TOKEN_SIGNALS = ("completion_ids", "completion_mask", "logprobs.sampler")
ROW_SIGNALS = ("finished", "stop_reason")


@dataclass
class GuideCache:
    """At most one verified completion a prompt, without padding.

    Attributes:
        draws: ``[M]`` draw of each completion's prompt.
        ends: ``[M]`` where each completion ends in the token signals; it begins where the one before ends.
        signals: the token signals of all completions one after the other, and the row signals, ``[M]``.
        version: the guide's policy version.
    """

    draws: Tensor
    ends: Tensor
    signals: dict[str, Tensor]
    version: int

    def __post_init__(self) -> None:
        self.index = {draw: i for i, draw in enumerate(self.draws.tolist())}

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, draw: int) -> bool:
        return draw in self.index

    @classmethod
    def of(cls, rollouts: Rollouts, rows: Sequence[int], version: int) -> GuideCache:
        """The completions in ``rows``, each of another prompt."""
        index = torch.tensor(rows, dtype=torch.long, device=rollouts.device)
        inside = torch.arange(rollouts.width, device=rollouts.device) < rollouts.lengths[index, None]
        signals = {name: rollouts.token[name][index][inside].cpu() for name in TOKEN_SIGNALS}
        signals |= {name: rollouts.row[name][index].cpu() for name in ROW_SIGNALS}
        draws = rollouts.prompts.draw[rollouts.group[index].cpu()]
        return cls(draws, rollouts.lengths[index].cumsum(0).cpu(), signals, version)

    @classmethod
    def cat(cls, parts: Sequence[GuideCache]) -> GuideCache:
        """All completions of several caches, which have no prompt in common."""
        starts = torch.tensor([0, *(int(p.ends[-1]) if len(p) else 0 for p in parts)]).cumsum(0)
        signals = {name: torch.cat([p.signals[name] for p in parts]) for name in parts[0].signals}
        ends = torch.cat([p.ends + start for p, start in zip(parts, starts.tolist())])
        return cls(torch.cat([p.draws for p in parts]), ends, signals, parts[0].version)

    def only(self, draws: set[int]) -> GuideCache:
        """The completions of the given prompts."""
        keep = torch.tensor([draw in draws for draw in self.draws.tolist()], dtype=torch.bool)
        lengths = self.ends.diff(prepend=torch.zeros(1, dtype=torch.long))
        tokens = keep.repeat_interleave(lengths)
        signals = {name: x[tokens if name in TOKEN_SIGNALS else keep] for name, x in self.signals.items()}
        return GuideCache(self.draws[keep], lengths[keep].cumsum(0), signals, self.version)

    def length(self, draw: int) -> int:
        """Tokens of the completion for a prompt."""
        span = self._span(draw)
        return span.stop - span.start

    def write(self, rollouts: Rollouts, row: int, draw: int) -> None:
        """Overwrite a row with the completion for its prompt, in place."""
        i, span = self.index[draw], self._span(draw)
        n = span.stop - span.start
        for name, signal in rollouts.token.items():
            known = name in TOKEN_SIGNALS
            signal[row] = math.nan if signal.is_floating_point() and not known else 0
            if known:
                signal[row, :n] = self.signals[name][span].to(signal)
        rollouts.loss_weights[row] = rollouts.completion_mask[row].float()
        rollouts.token["policy_version"][row, :n] = self.version
        for name in ROW_SIGNALS:
            rollouts.row[name][row] = self.signals[name][i]
        rollouts.row["lengths"][row], rollouts.row["origin"][row] = n, int(Origin.GUIDE)

    def _span(self, draw: int) -> slice:
        i = self.index[draw]
        return slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws, "ends": self.ends, "signals": dict(self.signals), "version": self.version}


def sample_in_parts(module: Any, draws: Sequence[int], samples: int, purpose: str) -> Iterator[Rollouts]:
    """Completions of the present policy for earlier prompts of the stream, scored, a training batch at a time.

    The ranks share the prompts, and all of them go through equally many parts (some may be empty).

    Args:
        module: the method.
        draws: positions of the prompts in the stream.
        samples: completions of each prompt.
        purpose: separates the sampling noise from training's and from other purposes'.
    """
    size = max(1, module.prompts_per_step * module.group_size // samples // ranks.world_size())  # prompts of a part
    for start in range(0, len(draws), size * ranks.world_size()):
        mine = list(draws[start : start + size * ranks.world_size()])[ranks.rank() :: ranks.world_size()]
        prompts = module.encode([module.stream.draw(draw) for draw in mine], mine)
        seed = mix_seeds(module.seed, purpose, module.clock)
        request = RolloutRequest.for_groups(prompts, samples, module.sampling, seed, entropy=False)
        with module.sampler.active():
            rollouts = module.sampler.sample(request).to(module.device)
        count_tokens(module, rollouts)
        yield module.score(rollouts)


def count_tokens(module: Any, rollouts: Rollouts) -> None:
    """Add a part's completions, on all ranks, to ``npo/guide_tokens``: what going back costs beside the replay."""
    tokens = float(ranks.all_sum(rollouts.lengths.sum()))
    module.log("npo/guide_tokens", module.numbers.get("npo/guide_tokens", 0.0) + tokens)


def sample_guide(module: Any, draws: Sequence[int], samples: int) -> tuple[GuideCache, dict[int, float]]:
    """Let the present policy try earlier prompts.

    Returns:
        The first verified-correct completion of each prompt (prompts that it cannot solve have none), and its accuracy
        on each prompt: draw -> share of correct completions, NaN if none is scorable. The same on all ranks.
    """
    parts: list[GuideCache] = []
    accuracy: dict[int, float] = {}
    for rollouts in sample_in_parts(module, draws, samples, "guide"):
        accuracy |= dict(zip(rollouts.prompts.draw.tolist(), rollouts.group_mean(rollouts.correct).tolist()))
        first: dict[int, int] = {}
        for row in (rollouts.correct == 1).nonzero()[:, 0].tolist():
            first.setdefault(int(rollouts.group[row]), row)
        parts.append(GuideCache.of(rollouts, list(first.values()), module.policy_version))
    gathered = ranks.gather_objects((parts, accuracy))
    everywhere = {draw: rate for _, rates in gathered for draw, rate in rates.items()}
    return GuideCache.cat([part for of_rank, _ in gathered for part in of_rank]), everywhere


def eligible_groups(rollouts: Rollouts, cache: GuideCache, gate: float, strict: bool = False) -> Tensor:
    r"""``[B]`` bool: groups with a cached completion and accuracy :math:`\hat p \le` ``gate`` (``<`` if ``strict``).

    A group that has a guide's completion already gets no second one.
    """
    accuracy = rollouts.group_mean(verdicts(rollouts))
    hard = accuracy < gate if strict else accuracy <= gate
    cached = torch.tensor([draw in cache for draw in rollouts.prompts.draw.tolist()], dtype=torch.bool)
    guided = rollouts.group_mean((rollouts.origin == Origin.GUIDE).float()) > 0
    return hard & cached.to(hard.device) & ~guided


def replace_slots(rollouts: Rollouts, groups: Tensor, cache: GuideCache, is_mode: ISMode) -> tuple[Rollouts, Tensor]:
    """Put the guide's completion into the last slot of each given group.

    Args:
        rollouts: the batch; it is not changed.
        groups: bool ``[B]``, groups to change.
        cache: the guide's completions.
        is_mode: whether the slot's π_old is the current policy (``on_policy``) or the guide (``exact``).

    Returns:
        A batch (wider if a guide's completion is longer) and the changed rows, int ``[n]``.
    """
    chosen = {g: int(rollouts.prompts.draw[g]) for g in groups.nonzero()[:, 0].tolist()}
    if not chosen:
        return rollouts, torch.zeros(0, dtype=torch.long, device=rollouts.device)
    rollouts = rollouts.pad(max(rollouts.width, *(cache.length(draw) for draw in chosen.values()))).clone()
    if is_mode == "exact" and "old" not in rollouts.logprobs:
        rollouts.logprobs["old"] = torch.full_like(rollouts.loss_weights, math.nan)
    rows = []
    for group, draw in chosen.items():
        members = ((rollouts.group == group) & rollouts.sampled).nonzero()[:, 0]
        rows.append(int(members[rollouts.row["sample"][members].argmax()]))
        cache.write(rollouts, rows[-1], draw)
    index = torch.tensor(rows, device=rollouts.device)
    if is_mode == "exact":
        sampler = rollouts.logprobs["sampler"][index]
        rollouts.logprobs["old"][index] = torch.where(rollouts.completion_mask[index], sampler, math.nan)
    return rollouts, index
