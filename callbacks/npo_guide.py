# SPDX-License-Identifier: Apache-2.0
"""What both NPO callbacks share: a cache of a later checkpoint's correct completions, and the slot they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl import distributed as ranks
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.samplers.base import RolloutRequest
from lit_rl.seeding import mix_seeds


@dataclass
class GuideCache:
    """Verified completions of a guide checkpoint, by the draw of their prompt.

    Attributes:
        completions: draw -> token ids.
        logprobs: draw -> log-probabilities under the guide, one a token.
        version: the guide's policy version.
    """

    completions: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    version: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def state_dict(self) -> dict[str, Any]:
        return {"completions": self.completions, "logprobs": self.logprobs, "version": self.version}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> GuideCache:
        """What `state_dict` returned, as a cache again."""
        return cls(dict(state["completions"]), dict(state["logprobs"]), state["version"])


def sample_prompts(module: Any, draws: list[int], samples: int, purpose: str) -> Rollouts:
    """Completions of the current policy for earlier prompts of the stream, scored.

    Every rank samples all of them: noise is counter-based, so the ranks agree up to rounding, and what is decided from
    them is broadcast from rank 0.

    Args:
        module: the method.
        draws: positions of the prompts in the stream.
        samples: completions of each prompt.
        purpose: separates the sampling noise from training's and from other purposes'.
    """
    records = [module.stream.at(draw, 1)[0] for draw in draws]
    prompts = module.encode(records, draws)
    seed = mix_seeds(module.seed, purpose, module.clock)
    request = RolloutRequest.for_groups(prompts, samples, module.sampling, seed, entropy=False)
    with module.sampler.active():
        rollouts = module.sampler.sample(request).to(module.device)
    return module.score(rollouts)


def build_cache(module: Any, rollouts: Rollouts) -> GuideCache:
    """The first verified-correct completion of each prompt; prompts that the guide cannot solve have no entry."""
    cache = GuideCache(version=module.policy_version)
    completions = rollouts.completions()
    for row in range(len(rollouts)):
        draw = int(rollouts.prompts.draw[int(rollouts.group[row])])
        if float(rollouts.correct[row]) != 1.0 or draw in cache.completions:
            continue
        cache.completions[draw] = completions[row]
        cache.logprobs[draw] = rollouts.logprobs["sampler"][row, : len(completions[row])].tolist()
    shared = ranks.broadcast_object(cache)
    assert isinstance(shared, GuideCache)
    return shared


def eligible_groups(rollouts: Rollouts, cache: GuideCache, gate: float, strict: bool = False) -> Tensor:
    r"""``[B]`` bool: groups with a cached completion and accuracy :math:`\hat p \le` ``gate`` (``<`` if ``strict``)."""
    accuracy = rollouts.group_mean(rollouts.correct)
    hard = accuracy < gate if strict else accuracy <= gate
    cached = torch.tensor([int(d) in cache.completions for d in rollouts.prompts.draw], dtype=torch.bool)
    return hard & cached.to(hard.device)


def replace_slots(
    rollouts: Rollouts, groups: Tensor, cache: GuideCache, is_mode: Literal["on_policy", "exact"]
) -> tuple[Rollouts, Tensor]:
    """Put the guide's completion into the last slot of each given group.

    Args:
        rollouts: the batch.
        groups: bool ``[B]``, groups to change.
        cache: the guide's completions.
        is_mode: whether the slot's π_old is the current policy (``on_policy``) or the guide (``exact``).

    Returns:
        The batch (wider if a guide's completion is longer) and the changed rows, int ``[n]``.
    """
    rows, draws = [], []
    for g in groups.nonzero()[:, 0].tolist():
        members = (rollouts.group == g).nonzero()[:, 0]
        rows.append(int(members[rollouts.row["sample"][members].argmax()]))
        draws.append(int(rollouts.prompts.draw[g]))
    if not rows:
        return rollouts, torch.zeros(0, dtype=torch.long, device=rollouts.device)
    rollouts = rollouts.pad(max(rollouts.width, *(len(cache.completions[d]) for d in draws)))
    rollouts.row = {k: v.clone() for k, v in rollouts.row.items()}
    rollouts.token = {k: v.clone() for k, v in rollouts.token.items()}
    if is_mode == "exact" and "old" not in rollouts.logprobs:
        rollouts.logprobs["old"] = torch.full_like(rollouts.loss_weights, math.nan)
    for row, draw in zip(rows, draws):
        _write_row(rollouts, row, cache, draw, is_mode)
    return rollouts, torch.tensor(rows, device=rollouts.device)


def _write_row(rollouts: Rollouts, row: int, cache: GuideCache, draw: int, is_mode: str) -> None:
    ids = cache.completions[draw]
    n = len(ids)
    for signal in rollouts.token.values():
        signal[row] = 0
    rollouts.completion_ids[row, :n] = torch.tensor(ids, device=rollouts.device)
    rollouts.completion_mask[row, :n] = True
    rollouts.loss_weights[row, :n] = 1.0
    rollouts.token["policy_version"][row, :n] = cache.version
    logprobs = torch.tensor(cache.logprobs[draw], device=rollouts.device)
    rollouts.logprobs["sampler"][row, :n] = logprobs
    if "old" in rollouts.logprobs:
        rollouts.logprobs["old"][row] = math.nan
        if is_mode == "exact":
            rollouts.logprobs["old"][row, :n] = logprobs
    rollouts.row["lengths"][row] = n
    rollouts.row["finished"][row] = True
    rollouts.row["stop_reason"][row] = 0
    rollouts.row["origin"][row] = int(Origin.GUIDE)


def inject(
    module: Any,
    rollouts: Rollouts,
    cache: GuideCache,
    gate: float,
    strict: bool,
    is_mode: Literal["on_policy", "exact"],
) -> Rollouts:
    """Slot replacement of one batch: the gate is measured before, rewards and verdicts are computed after."""
    groups = eligible_groups(rollouts, cache, gate, strict)
    candidates = torch.tensor([int(d) in cache.completions for d in rollouts.prompts.draw], dtype=torch.bool)
    rollouts, rows = replace_slots(rollouts, groups, cache, is_mode)
    module.rescore(rollouts, rows)
    module.ledger.total("npo/injected_groups", groups.sum())
    module.ledger.total("npo/candidates", candidates.sum())
    return rollouts
