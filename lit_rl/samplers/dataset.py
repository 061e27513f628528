# SPDX-License-Identifier: Apache-2.0
"""Data that nobody samples now: demonstrations and replayed text enter the step as rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.hf import HFSampler


class DatasetSampler(RolloutSampler):
    """Takes completions from a column of the dataset; validation still samples from the policy.

    Args:
        column: the column with the completion, text or token ids; several of a prompt as a list.
        origin: ``"demonstration"`` or ``"replay"``: which loss terms train these rows.
        append_end: end every completion with the end-of-sequence token.
        generator: samples where the column is absent (evaluation prompts); default `HFSampler`.
    """

    def __init__(
        self,
        column: str = "completion",
        origin: str = "demonstration",
        append_end: bool = True,
        generator: RolloutSampler | None = None,
    ) -> None:
        names = {"demonstration": Origin.DEMONSTRATION, "replay": Origin.REPLAY}
        if origin not in names:
            raise ValueError(f"origin must be one of {sorted(names)}, got {origin!r}.")
        self.column, self.origin, self.append_end = column, names[origin], append_end
        self.generator = generator or HFSampler()
        self._pending: list[RolloutRequest] = []

    def setup(self, model: torch.nn.Module, tokenizer: object) -> None:
        super().setup(model, tokenizer)
        self.generator.setup(model, tokenizer)

    def sync(self, model: torch.nn.Module, version: int) -> None:
        super().sync(model, version)
        self.generator.sync(model, version)

    def submit(self, request: RolloutRequest) -> None:
        self._pending.append(request)

    def collect(self) -> Rollouts:
        """The demonstrations of the prompts, one row each; the group size of the request does not apply."""
        request = self._pending.pop(0)
        column = request.prompts.columns.get(self.column)
        if column is None or all(c is None for c in column):
            if len(request) and column is None and not hasattr(self.generator, "model"):
                raise ValueError(f"DatasetSampler reads the column {self.column!r}, which the data does not have.")
            return self.generator.sample(request)
        group, completions = [], []
        for g, value in enumerate(column):
            for completion in value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]:
                group.append(g)
                completions.append(self._ids(completion))
        rollouts = Rollouts.build(
            request.prompts, torch.tensor(group, dtype=torch.long), completions, origin=self.origin
        )
        rollouts.row["stop_reason"].fill_(int(StopReason.END if self.append_end else StopReason.STOP))
        return rollouts

    def _ids(self, completion: str | list[int]) -> Tensor:
        if isinstance(completion, str):
            completion = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        if self.append_end:
            completion = [*completion, self.tokenizer.eos_token_id]
        return torch.tensor(completion, dtype=torch.long)

    def describe(self) -> str:
        return f"DatasetSampler({self.column})"
