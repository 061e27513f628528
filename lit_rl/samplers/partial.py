# SPDX-License-Identifier: Apache-2.0
"""Partial rollouts: start more than a step needs, stop when it has enough, continue the rest in the next step.

Active Partial Rollouts (APRIL, arXiv 2509.18521). A synchronous step waits for the longest completion of its batch;
here it waits for the N-th fastest of M > N groups. The price is that one completion may hold tokens of several policy
versions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.objectives import OffPolicyCorrection
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Progress, RolloutRequest, RolloutSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.wrapping import (
    SamplerWrapper,
    StalenessMeter,
    forget_tokens,
    is_open,
    replace_rows,
    staleness,
    unstarted,
)
from lit_rl.storage import pack_rollouts, unpack_rollouts


class PartialSampler(SamplerWrapper):
    """Over-provisions groups, stops at the needed number, and continues the unfinished ones first in the next step.

    A step that needs N groups runs a pool of M = ``oversampling`` · N: those left from earlier steps, oldest first, and
    fresh prompts for the rest. When N groups are complete (every member has ended), generation stops. Unfinished
    completions keep their tokens, log-probabilities and policy versions, and go on from there under the new weights
    (their prefix is computed again); members that had ended wait for the others. Groups that complete in the same
    decode step beyond N are not dropped, as they are in the authors' code, but returned first in the next step.

    Without a callback that asks for more prompts, M - N groups wait after every step and N fresh prompts enter each.
    Requests that are not part of a training step (evaluation) go straight to the inner sampler.

    The buffer is in the checkpoint, so resuming is exact; a rewind drops it.

    Args:
        inner: generates; it must be able to stop at a step and to continue a prefix. Default `HFSampler`.
        oversampling: M / N, at least 1; the authors use 2. At 1 nothing is ever interrupted.
        correction: what happens to tokens of earlier policy versions.

            - ``"recompute"``: nothing: π_old is the policy at the start of the update for every token (the paper).
            - ``"behaviour"``: π_old is the policy that sampled the token, so that the ratio corrects.
            - ``"truncated"``: π_old is recomputed and each token weighted with min(π_old / π_sampler, ``max_weight``).
            - ``"mask_prefix"``: they do not train; the advantage still comes from the whole completion.
        max_weight: bound C of ``"truncated"``.
        max_staleness: completions that hold a token more than this many policy versions old when a step begins are
            generated anew from their beginning; None: no bound (the paper).

    Raises:
        ValueError: an argument is out of range, or ``inner`` cannot continue completions.
    """

    carries_over = True

    def __init__(
        self,
        inner: RolloutSampler | None = None,
        oversampling: float = 2.0,
        correction: Literal["recompute", "behaviour", "truncated", "mask_prefix"] = "recompute",
        max_weight: float = 2.0,
        max_staleness: int | None = None,
    ) -> None:
        super().__init__(inner or HFSampler())
        if not oversampling >= 1:
            raise ValueError(f"oversampling must be at least 1 (1 interrupts nothing), got {oversampling}.")
        if correction not in ("recompute", "behaviour", "truncated", "mask_prefix"):
            raise ValueError(
                f"correction must be 'recompute', 'behaviour', 'truncated' or 'mask_prefix', got {correction!r}."
            )
        if max_staleness is not None and max_staleness < 1:
            raise ValueError(
                f"max_staleness must be at least 1, got {max_staleness}: at 0 no completion could be continued."
            )
        if not self.inner.continues_prefix:
            raise ValueError(
                f"PartialSampler interrupts completions and continues them, which {type(self.inner).__name__} cannot: "
                "use HFSampler, or that sampler without PartialSampler."
            )
        self.oversampling, self.correction = oversampling, correction
        self.max_weight, self.max_staleness = max_weight, max_staleness
        if correction == "truncated":
            self.loss_correction = OffPolicyCorrection("token", weight_high=max_weight)
        self.buffer: Rollouts | None = None  # groups that wait, oldest first; never edited in place
        self._numbers = _Numbers()

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        if self.correction in ("recompute", "truncated") and module.old_logprobs == "sampler":
            raise ValueError(
                f"PartialSampler(correction={self.correction!r}) needs π_old from the trainer, but old_logprobs="
                "'sampler' takes it from the sampler: set old_logprobs='auto', or correction='behaviour'."
            )

    # A step --------------------------------------------------------------------------------------------------------

    def prompts_to_draw(self, wanted: int) -> int:
        """M less the groups that wait."""
        waiting = 0 if self.buffer is None else len(self.buffer.prompts)
        return max(0, self.pool_size(wanted) - waiting)

    def pool_size(self, wanted: int) -> int:
        """M, the groups that are run for ``wanted`` = N of them."""
        return math.ceil(self.oversampling * wanted - 1e-9)

    def generate(self, request: RolloutRequest) -> Rollouts:
        """The first ``request.wanted`` groups to complete, in the order in which their prompts were drawn."""
        if request.wanted is None:
            return self.inner.sample(request)
        pool, waiting = self._pool(request)
        wanted = min(request.wanted, len(pool.prompts))
        pool = self._decode(pool, request, wanted)
        complete = _open_members(pool) == 0  # [B]
        chosen = complete & (complete.cumsum(0) <= wanted)
        left = pool.select_groups(~chosen)
        self.buffer = left.trim() if waiting is None else Rollouts.cat([left, waiting]).trim()
        delivered = pool.select_groups(chosen).trim()
        del delivered.row["budget"]
        self._numbers.age.add(delivered, self.policy_version)
        self._numbers.waiting(self.buffer)
        return self._corrected(delivered)

    def _pool(self, request: RolloutRequest) -> tuple[Rollouts, Rollouts | None]:
        """The groups of this round, those that waited first, and the groups that go on waiting."""
        fresh = unstarted(request)
        if self.buffer is None:
            return fresh, None
        first = torch.arange(len(self.buffer.prompts)) < self.pool_size(request.wanted or 0)
        resumed = self._without_stale(self.buffer.select_groups(first))
        return Rollouts.cat([resumed, fresh]), None if bool(first.all()) else self.buffer.select_groups(~first)

    def _without_stale(self, rollouts: Rollouts) -> Rollouts:
        if self.max_staleness is None:
            return rollouts
        stale = (staleness(rollouts, self.policy_version) > self.max_staleness).any(1)
        self._numbers.restarted += int(stale.sum())
        return forget_tokens(rollouts, stale)

    def _decode(self, pool: Rollouts, request: RolloutRequest, wanted: int) -> Rollouts:
        """The pool after generation has gone on until ``wanted`` of its groups are complete."""
        unfinished = is_open(pool)
        todo, members = _open_members(pool), pool.group[unfinished]
        if int((todo == 0).sum()) >= wanted:
            return pool
        part = pool.select(unfinished)
        self._numbers.prefilled += int(part.lengths.sum())

        def enough(progress: Progress) -> bool:
            if request.should_stop is not None and request.should_stop(progress):
                return True
            left = todo.index_add(0, members, -progress.finished.to(todo))
            return int((left == 0).sum()) >= wanted

        continued = self.inner.sample(
            replace(
                request,
                prompts=part.prompts,
                group=part.group,
                sample=part.row["sample"],
                budgets=part.row["budget"],
                prefix=part if part.width else None,
                should_stop=enough,
                wanted=None,
            )
        )
        return replace_rows(pool, unfinished, continued.to("cpu"))

    def _corrected(self, rollouts: Rollouts) -> Rollouts:
        if self.correction == "behaviour":
            rollouts.logprobs["old"] = rollouts.logprobs["sampler"].clone()
        if self.correction == "mask_prefix":
            stale = staleness(rollouts, self.policy_version) > 0
            rollouts.loss_weights = torch.where(stale, 0.0, rollouts.loss_weights)
        return rollouts

    # State ---------------------------------------------------------------------------------------------------------

    def boundary(self) -> Any:
        return self.buffer, super().boundary()

    def return_to(self, boundary: Any) -> None:
        self.buffer, inner = boundary
        super().return_to(inner)

    def on_rewind(self, model: torch.nn.Module) -> None:
        """Drop the groups that wait: they come from the abandoned future."""
        self.buffer = None
        super().on_rewind(model)

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Share of tokens of earlier versions, their age in versions, and what waits."""
        numbers, self._numbers = self._numbers.summary(), _Numbers()
        return numbers | super().metrics(rollouts)

    def state_dict(self) -> dict[str, Any]:
        buffer = None if self.buffer is None else pack_rollouts(self.buffer)
        return {"buffer": buffer, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer = None if state["buffer"] is None else unpack_rollouts(state["buffer"])
        super().load_state_dict(state)

    def describe(self) -> str:
        bound = "" if self.max_staleness is None else f", at most {self.max_staleness} versions old"
        return f"PartialSampler({self.inner.describe()}, M/N = {self.oversampling:g}, {self.correction}{bound})"


class _Numbers:
    """What happened in a step, over all its rounds."""

    def __init__(self) -> None:
        self.age = StalenessMeter()
        self.restarted = self.prefilled = self.groups = self.unfinished = 0

    def waiting(self, buffer: Rollouts) -> None:
        self.groups = len(buffer.prompts)
        self.unfinished = int((is_open(buffer) & (buffer.lengths > 0)).sum())

    def summary(self) -> dict[str, float]:
        return self.age.summary() | {
            "waiting_groups": float(self.groups),
            "partial_completions": float(self.unfinished),
            "restarted_completions": float(self.restarted),
            "prefilled_tokens": float(self.prefilled),
        }


def _open_members(rollouts: Rollouts) -> Tensor:
    """``[B]`` int: rows of each group that have not ended."""
    return torch.bincount(rollouts.group[is_open(rollouts)], minlength=len(rollouts.prompts))
