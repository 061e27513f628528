# SPDX-License-Identifier: Apache-2.0
"""Some prompts are answered by the policy, the others by the dataset or by a teacher: the off-policy part of GKD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.policies import FrozenPolicy
from lit_rl.rollouts import Origin, Prompts, Rollouts
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.dataset import DatasetSampler, for_prompts, with_prompts
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.noise import row_keys, uniforms
from lit_rl.samplers.wrapping import SamplerWrapper


def answered_by_policy(prompts: Prompts, seed: int, fraction: float) -> Tensor:
    """``[B]`` bool: a coin for each prompt, a function of (seed, draw), true with probability ``fraction``."""
    keys = row_keys(seed, prompts.draw.cpu(), torch.full_like(prompts.draw.cpu(), -2))  # no completion has sample -2
    return uniforms(keys, torch.zeros_like(keys)) < fraction


def check_fraction(fraction: float) -> None:
    """Refuse what is no probability."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is the share of prompts that the policy answers, in [0, 1]; got {fraction}.")


class DatasetMixtureSampler(DatasetSampler):
    """Samples for a share of the prompts and takes the dataset's completions for the others.

    A prompt without a completion in the dataset is always sampled for.

    Args:
        fraction: share of the prompts that the policy answers.
        column: see `DatasetSampler`.
        append_end: see `DatasetSampler`.
        max_tokens: see `DatasetSampler`.
        generator: the policy's sampler; default `HFSampler`.
    """

    def __init__(
        self,
        fraction: float = 0.5,
        column: str = "completion",
        append_end: bool = True,
        max_tokens: int | None = None,
        generator: RolloutSampler | None = None,
    ) -> None:
        check_fraction(fraction)
        super().__init__(column, "demonstration", append_end, max_tokens, generator)
        self.fraction = fraction

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        available = module.data.train_stream.columns()
        if self.fraction < 1 and self.column not in available:
            raise ValueError(
                f"A share of {1 - self.fraction:g} of the completions is to come from the column {self.column!r}, but "
                f"the data has only {sorted(available)}: name the right column."
            )

    def generate(self, request: RolloutRequest) -> Rollouts:
        """Hide the completions of the prompts that the policy answers."""
        own = answered_by_policy(request.prompts, request.seed, self.fraction).tolist()
        written = request.prompts.columns.get(self.column, [None] * len(own))
        columns = {**request.prompts.columns, self.column: [None if mine else v for mine, v in zip(own, written)]}
        rollouts = super().generate(replace(request, prompts=replace(request.prompts, columns=columns)))
        return replace(rollouts, prompts=request.prompts)

    def describe(self) -> str:
        return f"{self.inner.describe()} for {self.fraction:g} of the prompts, the column {self.column!r} for the rest"


class TeacherMixtureSampler(SamplerWrapper):
    """Samples from the policy for a share of the prompts, and from a teacher for the others (sequence-level KD).

    The teacher's rows have the origin ``TEACHER``. It sees the student's prompts, whatever it is shown for scoring.

    Args:
        teacher: who answers the other prompts.
        fraction: share of the prompts that the policy answers.
        inner: the policy's sampler; default `HFSampler`.
        writer: the teacher's sampler; default `HFSampler`.
    """

    def __init__(
        self,
        teacher: FrozenPolicy,
        fraction: float = 0.5,
        inner: RolloutSampler | None = None,
        writer: RolloutSampler | None = None,
    ) -> None:
        check_fraction(fraction)
        super().__init__(inner or HFSampler())
        self.teacher, self.fraction, self.writer = teacher, fraction, writer or HFSampler()
        self.continues_prefix = False

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        with self.teacher.model(model) as own:
            self.writer.setup(own, tokenizer)

    def generate(self, request: RolloutRequest) -> Rollouts:
        """Both parts, in the order of the request's prompts."""
        if request.wanted is None:
            return self.inner.sample(request)
        mine = answered_by_policy(request.prompts, request.seed, self.fraction)
        own, others = mine.nonzero()[:, 0].tolist(), (~mine).nonzero()[:, 0].tolist()
        parts = [self.inner.sample(for_prompts(request, own))] if own else []
        if others:
            with self.teacher.model(self.model):
                taught = self.writer.sample(for_prompts(request, others))
            taught.row["origin"] = torch.full_like(taught.origin, int(Origin.TEACHER))
            parts.append(taught)
        return with_prompts(Rollouts.cat(parts), request.prompts, [*own, *others])

    def close(self) -> None:
        super().close()
        self.writer.close()

    def describe(self) -> str:
        return f"{self.inner.describe()} for {self.fraction:g} of the prompts, the teacher for the rest"
