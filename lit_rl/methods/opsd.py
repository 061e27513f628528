# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation: one model in two roles, the teacher sees the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.opd import OPD
from lit_rl.methods.reasoning import ANALYSES, ANALYSIS_TEMPLATE, ReasonFirst
from lit_rl.methods.teaching import DivergenceTerm
from lit_rl.methods.terms import Current, Signals, Term
from lit_rl.objectives import Divergence
from lit_rl.policies import AdapterOff, FrozenCopy, FrozenPolicy, Policy, PrivilegedPrompt, Teacher
from lit_rl.rollouts import Prompts, Rollouts


def initial_policy(policy: Policy) -> FrozenPolicy:
    """The policy as it is before training, at no cost where adapters can be switched off."""
    return AdapterOff() if policy.lora is not None else FrozenCopy()


class OPSD(OPD):
    """Self-Distilled Reasoner (arXiv 2601.18734): the student learns to say what it would say if it knew the solution.

    Student and teacher are the same network in two contexts: the problem, and the problem with a reference solution.
    The student writes one completion, both score every position of it, and the divergence of their next-token
    distributions is minimised. Both logits are divided by the sampling temperature. No reward, no second model.

    The paper clips each summand of the divergence at 0.05, so that style words do not dominate; what is left is no
    divergence, and on single tokens it can push away from the teacher (see `Divergence`). ``token_clip`` is the safer
    variant.

    Args:
        policy: the student.
        prompt: what the teacher sees; default: prompt and reference solution (the column ``solution``). With
            ``reason_first`` it is what the teacher answers with its analysis; default: `ANALYSIS_TEMPLATE`.
        teacher: whose weights it has. Default: the initial ones (`AdapterOff` with LoRA, else `FrozenCopy`). `EMA` and
            `Live` are the paper's other two; its average is updated after each optimizer step, ours after each rollout
            step, which is the same with one update a rollout.
        divergence: default forward KL with summands of at most 0.05.
        temperature: None is the sampling temperature.
        reason_first: let the teacher write an analysis of the solution before it scores; None: it scores at once.
        style_tokens: texts whose tokens' divergence is logged apart (``opsd/style_divergence``), such as ``" wait"``.
        kwargs: arguments of `OPD`, ``loss="policy_gradient"`` for the sampled-token ablation among them.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: PrivilegedPrompt | None = None,
        teacher: FrozenPolicy | None = None,
        divergence: Divergence | None = None,
        temperature: float | None = None,
        reason_first: ReasonFirst | None = None,
        style_tokens: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(teacher, Teacher):
            raise ValueError("OPSD makes the Teacher itself: give its policy as `teacher` and its prompt as `prompt`.")
        if prompt is None:
            prompt = PrivilegedPrompt(ANALYSIS_TEMPLATE) if reason_first is not None else PrivilegedPrompt()
        super().__init__(
            policy,
            teacher=Teacher(teacher or initial_policy(policy), prompt),
            divergence=divergence or Divergence(beta=0.0, entry_clip=0.05),
            temperature=temperature,
            **kwargs,
        )
        self.reason_first, self.style_tokens = reason_first, list(style_tokens)

    def recall(self, rollouts: Rollouts) -> Rollouts:
        """Let the teacher write its analyses, if it is to, before anybody asks for its scores."""
        if self.reason_first is not None:
            (teacher,) = self.teachers
            with self.ledger.timed("analysis"):
                shown = super().shown_to(teacher, rollouts.prompts)
                prompts = self.reason_first.write(self, teacher, rollouts.prompts, shown)
            rollouts = replace(rollouts, prompts=prompts)
        return super().recall(rollouts)

    def shown_to(self, teacher: Teacher, prompts: Prompts) -> list[Tensor]:
        shown = super().shown_to(teacher, prompts)
        first = self.reason_first
        if first is None:
            return shown
        return [first.after(ids, written, self.tokenizer) for ids, written in zip(shown, prompts.columns[ANALYSES])]

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self.reason_first is not None:
            self.reason_first.close()

    def describe(self) -> list[str]:
        lines = super().describe()
        return lines if self.reason_first is None else [*lines, f"teacher: {self.reason_first.describe()}"]

    def terms(self) -> list[Term]:
        if self.loss != "gkd" or not self.style_tokens:
            return super().terms()
        shape: dict[str, Any] = {"aggregation": self.aggregation, "max_length": self.sampling.max_tokens}
        return [StyleTerm(self, self.divergence, self.style_tokens, coefficient="distill_coef", **shape)]


class StyleTerm(DivergenceTerm):
    """The divergence, with that of some tokens logged apart."""

    def __init__(self, module: OPSD, divergence: Divergence, style_tokens: list[str], **kwargs: Any) -> None:
        super().__init__(module, divergence, **kwargs)
        self.style_tokens = style_tokens
        self._ids: Tensor | None = None

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        values = super().values(batch, current, signals)
        if self._ids is None:
            encoded = [self.module.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.style_tokens]
            self._ids = torch.tensor(sorted({i for ids in encoded for i in ids}), dtype=torch.long)
        style = torch.isin(batch.completion_ids, self._ids.to(batch.device)) & (self.trained(batch) != 0)
        signals.mean("opsd/style_divergence", values, style)
        return values
