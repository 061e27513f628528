# SPDX-License-Identifier: Apache-2.0
"""Data that nobody samples now: demonstrations and replayed text enter the step as rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl.rollouts import Origin, Prompts, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.wrapping import SamplerWrapper

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule


class DatasetSampler(SamplerWrapper):
    """Takes completions from a column of the dataset, and samples for the prompts that have none there.

    In a training step a prompt with a completion gives one row for each (the group size does not apply); its origin
    says that no policy sampled it, so that likelihood terms train it and policy terms, baselines and statistics leave
    it out. Requests that are not part of a training step, evaluation above all, are sampled whatever the data holds.

    Args:
        column: the column with the completion, text or token ids; several of a prompt as a list. None: no completion.
        origin: ``"demonstration"`` or ``"replay"``: which loss terms train these rows.
        append_end: end every completion with the end-of-sequence token.
        max_tokens: completions are cut to this length, and have then no end; None: no limit.
        generator: samples for the other prompts; default `HFSampler`.
    """

    def __init__(
        self,
        column: str = "completion",
        origin: Literal["demonstration", "replay"] = "demonstration",
        append_end: bool = True,
        max_tokens: int | None = None,
        generator: RolloutSampler | None = None,
    ) -> None:
        names = {"demonstration": Origin.DEMONSTRATION, "replay": Origin.REPLAY}
        if origin not in names:
            raise ValueError(f"origin must be one of {sorted(names)}, got {origin!r}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; None sets no limit.")
        super().__init__(generator or HFSampler())
        self.continues_prefix = False
        self.column, self.origin = column, names[origin]
        self.append_end, self.max_tokens = append_end, max_tokens

    def check_setup(self, module: RLModule) -> None:
        super().check_setup(module)
        trained_by = [term for term in module.loss_terms if term.origins is None or self.origin in term.origins]
        what = f"{type(self).__name__} replays completions as {self.origin.name.lower()}, which"
        if not trained_by:
            raise ValueError(f"{what} no loss term trains: use the sampler inside it (`generator`) alone.")
        if all(term.coefficient(module) == 0 for term in trained_by):
            names = " and ".join(f"loss/{term.name}" for term in trained_by)
            rank_zero_warn(f"{what} only {names} trains, with coefficient 0: set sft_coef, if no schedule does.")

    def generate(self, request: RolloutRequest) -> Rollouts:
        """The completions of the data and the sampled ones, in the order of the request's prompts."""
        column = request.prompts.columns.get(self.column, [])
        written = [g for g, value in enumerate(column) if value is not None]
        if request.wanted is None or not written:
            return self.inner.sample(request)
        others = [g for g, value in enumerate(column) if value is None]
        replayed = self.replay(request.prompts.select(written))
        if not others:
            return replayed
        sampled = self.inner.sample(for_prompts(request, others))
        both = Rollouts.cat([sampled, replayed.to(sampled.device)])
        return with_prompts(both, request.prompts, [*others, *written])

    def replay(self, prompts: Prompts) -> Rollouts:
        """The completions that the data holds for these prompts."""
        group, completions, reasons = [], [], []
        for g, value in enumerate(prompts.columns[self.column]):
            several = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
            for completion in value if several else [value]:
                ids, reason = self.tokenize(completion)
                group.append(g)
                completions.append(torch.tensor(ids, dtype=torch.long))
                reasons.append(int(reason))
        stop_reason = torch.tensor(reasons, dtype=torch.long)
        index = torch.tensor(group, dtype=torch.long)
        return Rollouts.build(prompts, index, completions, stop_reason=stop_reason, origin=self.origin)

    def tokenize(self, completion: str | Sequence[int]) -> tuple[list[int], StopReason]:
        """Token ids of a completion, and how it ends."""
        text = isinstance(completion, str)
        ids = list(self.tokenizer(completion, add_special_tokens=False)["input_ids"] if text else completion)
        if self.append_end:
            ids.append(self.tokenizer.eos_token_id)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            return ids[: self.max_tokens], StopReason.LENGTH
        return ids, StopReason.END if self.append_end else StopReason.STOP

    def describe(self) -> str:
        return f"DatasetSampler({self.column}; otherwise {self.inner.describe()})"


def for_prompts(request: RolloutRequest, prompts: Sequence[int]) -> RolloutRequest:
    """The part of a request that belongs to some of its prompts."""
    kept = torch.full((len(request.prompts),), -1, dtype=torch.long)
    kept[list(prompts)] = torch.arange(len(prompts))
    group = kept[request.group.cpu()]
    rows = group >= 0
    per_row: dict[str, Any] = {"group": group[rows], "sample": request.sample[rows]}
    if request.budgets is not None:
        per_row["budgets"] = request.budgets[rows]
    if request.prefix is not None:
        per_row["prefix"] = request.prefix.select(rows)
    return replace(request, prompts=request.prompts.select(prompts), wanted=len(prompts), **per_row)


def with_prompts(rollouts: Rollouts, prompts: Prompts, at: Sequence[int]) -> Rollouts:
    """Rows in the order of ``prompts``; prompt i of ``rollouts`` is prompt ``at[i]`` there."""
    group: Tensor = torch.tensor(list(at), dtype=torch.long, device=rollouts.device)[rollouts.group]
    moved = replace(rollouts, prompts=prompts, row={**rollouts.row, "group": group})
    return moved.select(torch.argsort(group, stable=True))
