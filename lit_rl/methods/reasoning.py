# SPDX-License-Identifier: Apache-2.0
"""A teacher that first explains the solution to itself, and scores the student with that explanation in view."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rl.policies import Teacher
from lit_rl.rollouts import Prompts, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.seeding import mix_seeds

if TYPE_CHECKING:
    from lit_rl.methods.teaching import Taught

ANALYSES = "teacher_analysis"
"""Column of the prompts with the teacher's analyses of a step, as token ids; None where there was no solution."""

ANALYSIS_TEMPLATE = """{prompt}

Here is a correct solution to this problem:
{solution}

Explain the key steps of this solution and the ideas behind them. Do not solve the problem in a way of your own."""

TRANSITION = """

You have understood the reasoning behind each step. Now derive the answer to the problem above once more, in your own
words and in the format asked for there:

"""


class ReasonFirst:
    """OPSD's option ``reason_first``: what the teacher reads is prompt, its own analysis, a transition, the completion.

    The analysis answers the teacher's prompt, which must ask for one (`ANALYSIS_TEMPLATE`). It is sampled once a step
    for each prompt, from the teacher's weights of that step, with the temperature and the support of the student's
    sampling; its noise depends on (seed, draw) alone. As in the authors' code analysis and transition are appended as
    tokens, outside of any chat template; the analysis' end-of-sequence token is left out, which is ours.

    Args:
        max_tokens: budget of an analysis (the authors: 4,096).
        transition: text between the analysis and the completion.
        sampler: writes the analyses. Default `HFSampler`.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """

    def __init__(
        self, max_tokens: int = 4096, transition: str = TRANSITION, sampler: RolloutSampler | None = None
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.max_tokens, self.transition, self.sampler = max_tokens, transition, sampler or HFSampler()
        if self.sampler.carries_over or self.sampler.selects:
            raise ValueError(f"{type(self.sampler).__name__} cannot write analyses: a step needs them at once.")
        self._writer: nn.Module | None = None

    def write(self, module: Taught, teacher: Teacher, prompts: Prompts, shown: list[Tensor]) -> Prompts:
        """The prompts with the analyses of this step in the column `ANALYSES`.

        Args:
            module: the method.
            teacher: who writes.
            prompts: the B prompts of the step.
            shown: their token ids as the teacher sees them.

        Raises:
            ValueError: prompt, analysis, transition and completion do not fit into the model's positions.
        """
        assert teacher.prompt is not None
        known = [prompts.columns[name] for name in teacher.prompt.columns]
        mine = [g for g in range(len(prompts)) if all(column[g] is not None for column in known)]
        analyses: list[list[int] | None] = [None for _ in shown]
        if mine:
            asked = replace(prompts, ids=shown).select(mine)
            self._check_positions(module, asked)
            rollouts = self._sampled(module, teacher, asked)
            self._report(module, rollouts)
            for g, ids, reason in zip(mine, rollouts.completions(), rollouts.row["stop_reason"].tolist()):
                analyses[g] = ids[: len(ids) - (reason == StopReason.END)]
        return replace(prompts, columns={**prompts.columns, ANALYSES: analyses})

    def after(self, shown: Tensor, analysis: list[int] | None, tokenizer: Any) -> Tensor:
        """What stands before a completion: the teacher's prompt, its analysis, the transition; ids ``[T]``."""
        if analysis is None:
            return shown
        transition = tokenizer(self.transition, add_special_tokens=False)["input_ids"]
        return torch.cat([shown, torch.tensor([*analysis, *transition], dtype=shown.dtype, device=shown.device)])

    def _sampled(self, module: Taught, teacher: Teacher, asked: Prompts) -> Rollouts:
        sampling = replace(module.sampling, max_tokens=self.max_tokens, stop=(), stop_token_ids=())
        request = RolloutRequest.for_groups(asked, 1, sampling, mix_seeds(module.seed, "analysis"), entropy=False)
        with teacher.model(module.model) as writer, self.sampler.active():
            if writer is not self._writer:
                self.sampler.setup(writer, module.tokenizer)
                self._writer = writer
            self.sampler.sync(writer, module.policy_version)
            return self.sampler.sample(request)

    def _check_positions(self, module: Taught, asked: Prompts) -> None:
        config: Any = module.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        transition = len(module.tokenizer(self.transition, add_special_tokens=False)["input_ids"])
        parts = max(len(x) for x in asked.ids), self.max_tokens, transition, module.sampling.max_tokens
        if limit is not None and sum(parts) > limit:
            raise ValueError(
                f"The teacher would read a prompt of {parts[0]} tokens, an analysis of up to {parts[1]}, a transition "
                f"of {parts[2]} and a completion of up to {parts[3]}: more than the {limit} positions that the model "
                "has. Lower max_tokens of reason_first or of the sampling."
            )

    def _report(self, module: Taught, rollouts: Rollouts) -> None:
        module.ledger.mean("opsd/analysis_length", rollouts.lengths.float())
        cut = rollouts.row["stop_reason"] == StopReason.LENGTH
        module.ledger.mean("opsd/analysis_truncated_ratio", cut.float())

    def close(self) -> None:
        """Release the sampler's processes and memory; the next analyses start it again."""
        self.sampler.close()
        self._writer = None

    def describe(self) -> str:
        """One line for the run header."""
        return f"writes an analysis of at most {self.max_tokens:,} tokens first ({self.sampler.describe()})"
