# SPDX-License-Identifier: Apache-2.0
"""What samplers that wrap another sampler have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling


class SamplerWrapper(RolloutSampler):
    """Passes everything on to an inner sampler. A subclass implements `generate` and changes what it must.

    Args:
        inner: the sampler that does the work.

    Raises:
        ValueError: ``inner`` carries work over from step to step or selects, which only the outermost sampler can.
    """

    def __init__(self, inner: RolloutSampler) -> None:
        if inner.carries_over or inner.selects:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {type(inner).__name__}, which decides for a whole step what to "
                f"return: make {type(inner).__name__} the outermost sampler."
            )
        self.inner = inner
        self.in_process = inner.in_process
        self.continues_prefix = inner.continues_prefix
        self.provides = inner.provides
        self.loss_correction = inner.loss_correction
        self._pending: deque[RolloutRequest] = deque()

    def generate(self, request: RolloutRequest) -> Rollouts:
        """The completions of a request."""
        return self.inner.sample(request)

    def submit(self, request: RolloutRequest) -> None:
        """Keep the request for `collect`, which does the work."""
        self._pending.append(request)

    def collect(self) -> Rollouts:
        """The completions of the oldest request."""
        if not self._pending:
            raise RuntimeError(f"{type(self).__name__} has nothing to collect: submit a request first.")
        return self.generate(self._pending.popleft())

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        self.inner.setup(model, tokenizer)

    def sync(self, model: torch.nn.Module, version: int) -> None:
        super().sync(model, version)
        self.inner.sync(model, version)

    def next_token_logprobs(self, contexts: Sequence[Tensor], sampling: Sampling) -> Tensor:
        return self.inner.next_token_logprobs(contexts, sampling)

    def check_setup(self, module: Any) -> None:
        self.inner.check_setup(module)

    def on_rewind(self, model: torch.nn.Module) -> None:
        self._pending.clear()
        self.inner.on_rewind(model)

    def boundary(self) -> Any:
        return self.inner.boundary()

    def return_to(self, boundary: Any) -> None:
        self._pending.clear()
        self.inner.return_to(boundary)

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        return self.inner.metrics(rollouts)

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.inner.active():
            yield

    def state_dict(self) -> dict[str, Any]:
        state = self.inner.state_dict()
        return {"inner": state} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.inner.load_state_dict(state["inner"])

    def describe(self) -> str:
        return f"{type(self).__name__}({self.inner.describe()})"

    def close(self) -> None:
        self.inner.close()


def unstarted(request: RolloutRequest) -> Rollouts:
    """The rows of a request before anything is generated: empty or, with a prefix, as far as that goes.

    They have `StopReason.ABORTED` and a row signal ``budget``; a row that its prefix has finished keeps its reason.
    """
    n = len(request)
    if request.prefix is None:
        empty = [torch.zeros(0)] * n
        reason = torch.full((n,), int(StopReason.ABORTED))
        rows = Rollouts.build(
            request.prompts,
            request.group.cpu(),
            empty,
            sampler_logprobs=empty,
            stop_reason=reason,
            sample=request.sample.cpu(),
        )
    else:
        rows = replace(request.prefix.to("cpu").clone(), prompts=request.prompts)
        rows.row |= {"group": request.group.cpu(), "sample": request.sample.cpu()}
        rows.row["stop_reason"] = torch.where(rows.finished, rows.row["stop_reason"], int(StopReason.ABORTED))
    budgets = request.budgets if request.budgets is not None else torch.full((n,), request.sampling.max_tokens)
    rows.row["budget"] = budgets.long().cpu()
    return rows


def prompts_in_parts(request: RolloutRequest, size: int) -> Iterator[RolloutRequest]:
    """The request in parts of at most ``size`` prompts."""
    for first in range(0, len(request.prompts), size):
        rows = ((request.group >= first) & (request.group < first + size)).nonzero()[:, 0]
        yield replace(
            request,
            prompts=request.prompts.select(range(first, min(first + size, len(request.prompts)))),
            group=request.group[rows] - first,
            sample=request.sample[rows],
            budgets=None if request.budgets is None else request.budgets[rows],
            prefix=None if request.prefix is None else request.prefix.select(rows),
        )


def staleness(rollouts: Rollouts, version: int) -> Tensor:
    """``[N, T]`` int: by how many versions each generated token is older than ``version``; 0 elsewhere."""
    return torch.where(rollouts.completion_mask, version - rollouts.token["policy_version"], 0)


class StalenessMeter:
    """How old the tokens of a step are, in policy versions, over all its rounds."""

    def __init__(self) -> None:
        self.tokens = self.stale = self.age = self.oldest = 0

    def add(self, rollouts: Rollouts, version: int) -> None:
        """Count the tokens of a batch that ``version`` is to train."""
        age = staleness(rollouts, version)
        self.tokens += int(rollouts.completion_mask.sum())
        self.stale += int((age > 0).sum())
        self.age += int(age.sum())
        self.oldest = max(self.oldest, int(age.max()) if age.numel() else 0)

    def summary(self) -> dict[str, float]:
        """Share of tokens of earlier versions, mean and largest age."""
        tokens = max(self.tokens, 1)
        return {
            "off_policy_ratio": self.stale / tokens,
            "staleness_mean": self.age / tokens,
            "staleness_max": float(self.oldest),
        }


def is_open(rollouts: Rollouts) -> Tensor:
    """``[N]`` bool: rows that have not ended."""
    return rollouts.row["stop_reason"] == StopReason.ABORTED


def replace_rows(rollouts: Rollouts, rows: Tensor, new: Rollouts) -> Rollouts:
    """The batch with the given rows (bool ``[N]``) replaced by those of ``new``, which are in the same order.

    Which prompt, unit, sample and budget a row has stays as it was.
    """
    merged = Rollouts.cat([rollouts.select(~rows), new])
    origin = torch.cat([(~rows).nonzero()[:, 0], rows.nonzero()[:, 0]])  # which row each row of merged was
    merged = replace(merged, prompts=rollouts.prompts)  # cat has repeated prompts whose rows are in both parts
    merged.row |= {name: rollouts.row[name][origin] for name in ("group", "unit", "sample", "budget")}
    return merged.select(torch.argsort(origin))


def forget_tokens(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """A copy in which the given rows (bool ``[N]``) are as if nothing of them had been generated."""
    out = rollouts.clone()
    for name, values in out.token.items():
        out.token[name] = torch.where(rows[:, None], torch.zeros_like(values), values)
    out.row["lengths"] = torch.where(rows, 0, out.lengths)
    out.row["finished"] = out.finished & ~rows
    out.row["stop_reason"] = torch.where(rows, int(StopReason.ABORTED), out.row["stop_reason"])
    return out
