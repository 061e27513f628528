# SPDX-License-Identifier: Apache-2.0
"""What a method with a teacher adds to an `RLModule`: scores of the teacher as signals, its distributions as a loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.module import RLModule
from lit_rl.methods.recalling import Provider, scored_by
from lit_rl.methods.terms import Current, PolicyTerm, Signals, TokenTerm
from lit_rl.objectives import Divergence
from lit_rl.policies import FrozenPolicy, TokenStates, completion_states
from lit_rl.policies.divergence import compare, vocabulary_divergence
from lit_rl.policies.divergence_tiles import Notes, View
from lit_rl.policies.scoring import evaluation_mode
from lit_rl.policies.teacher import Teacher, assign
from lit_rl.rollouts import Prompts, Rollouts

COMPARISONS = ("forward", "reverse", "jsd", "student_entropy", "teacher_entropy")
"""The token signals ``divergence.<name>`` that callbacks can require, see `lit_rl.policies.divergence.Comparison`."""


class Taught(RLModule):
    """A method with one teacher, or several that share the data sources among them.

    It provides ``logprobs.teacher`` (the teacher's log-probabilities of the sampled tokens, NaN where nobody teaches
    the source of a prompt) and ``divergence.*`` (see `COMPARISONS`), each computed only if somebody requires it.

    Attributes:
        teachers: in the order in which they are asked whether they teach a source.
    """

    teachers: list[Teacher]

    def teach_by(self, teacher: FrozenPolicy | Sequence[FrozenPolicy]) -> None:
        """Take one or several; a frozen policy that is no `Teacher` becomes one that sees the student's prompt."""
        several = [teacher] if isinstance(teacher, FrozenPolicy) else list(teacher)
        if not several:
            raise ValueError(f"{type(self).__name__} needs a teacher: give at least one in `teacher`.")
        self.teachers = [t if isinstance(t, Teacher) else Teacher(t) for t in several]

    @property
    def loss_temperature(self) -> float:
        """What divides the logits of both models where their distributions are compared."""
        return self.sampling.temperature or 1.0

    # Life of the teachers ------------------------------------------------------------------------------------------

    def frozen_policies(self) -> dict[str, FrozenPolicy]:
        alone = len(self.teachers) == 1
        named = {f"teacher{'' if alone else i}": teacher for i, teacher in enumerate(self.teachers)}
        return {**super().frozen_policies(), **named}

    def default_providers(self) -> dict[str, Provider]:
        compared: dict[str, Provider] = {f"divergence.{name}": teacher_comparison for name in COMPARISONS}
        return {**super().default_providers(), "logprobs.teacher": teacher_logprobs, **compared}

    def check_columns(self, stage: str) -> None:
        super().check_columns(stage)
        if stage != "fit":
            return
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        added = {name for callback in callbacks for name in getattr(callback, "adds_columns", ())}
        for teacher in self.teachers:
            if teacher.prompt is not None and teacher.sources is None:
                teacher.prompt.check_columns(self.data.train_stream.columns() | added)

    def configure_model(self) -> None:
        known = self.model is not None
        super().configure_model()
        for teacher in () if known else self.teachers:
            teacher.check_vocabulary(self.model, self.tokenizer)

    def describe(self) -> list[str]:
        return [*(f"teacher: {teacher.describe()}" for teacher in self.teachers), *super().describe()]

    # Asking the teachers -------------------------------------------------------------------------------------------

    def lessons(self, rollouts: Rollouts) -> Iterator[tuple[Teacher, Tensor]]:
        """Each teacher with the rows (int ``[n]``) that it teaches, if there are any."""
        teacher_of_row = assign(self.teachers, rollouts.prompts).to(rollouts.device)[rollouts.group]
        for i, teacher in enumerate(self.teachers):
            rows = (teacher_of_row == i).nonzero()[:, 0]
            if len(rows):
                yield teacher, rows

    def taught(self, rollouts: Rollouts) -> Tensor:
        """``[N]`` bool: rows that some teacher teaches."""
        return (assign(self.teachers, rollouts.prompts) >= 0).to(rollouts.device)[rollouts.group]

    def shown_to(self, teacher: Teacher, prompts: Prompts) -> list[Tensor]:
        """B prompts as the teacher sees them; those of sources that it does not teach stay the student's."""
        if teacher.prompt is None:
            return prompts.ids
        index = self.teachers.index(teacher)
        mine = [g for g, i in enumerate(assign(self.teachers, prompts).tolist()) if i == index]
        records = [self.stream.at(int(prompts.draw[g]), 1)[0] for g in mine]
        encoded = dict(zip(mine, teacher.prompt.encode(self.encoder, records, prompts.select(mine))))
        return [encoded.get(g, ids) for g, ids in enumerate(prompts.ids)]

    def states_of(self, teacher: Teacher, rollouts: Rollouts, wanted: Tensor) -> TokenStates:
        """The teacher's hidden states behind the wanted tokens (bool ``[N, T]``), without gradient."""
        shown = self.shown_to(teacher, rollouts.prompts)
        with teacher.model(self.model) as model:
            return states_under(model, shown, rollouts, wanted)


def states_under(
    model: torch.nn.Module, prompt_ids: Sequence[Tensor], rollouts: Rollouts, wanted: Tensor
) -> TokenStates:
    """The hidden states of a model behind the wanted tokens of a batch, under B prompts of its own."""
    return completion_states(
        model,
        prompt_ids,
        rollouts.completion_ids,
        rollouts.completion_mask,
        rollouts.lengths,
        prompt_index=rollouts.group,
        wanted=wanted,
    )


def teacher_logprobs(module: Any, rollouts: Rollouts) -> None:
    """Provider of ``logprobs.teacher``."""
    scores = torch.full_like(rollouts.loss_weights, math.nan)
    for teacher, rows in module.lessons(rollouts):
        part = rollouts.select(rows)
        # With the teacher's own prompts, so that micro-batches are cut by the length that it reads.
        part = replace(part, prompts=replace(part.prompts, ids=module.shown_to(teacher, part.prompts)))
        found = scored_by(teacher, module, part)
        scores = scores.to(found.dtype).index_copy(0, rows, found)
    module.ledger.mean("teacher/absent_ratio", (~module.taught(rollouts)).float())
    rollouts.logprobs["teacher"] = scores


@torch.no_grad()
def teacher_comparison(module: Any, rollouts: Rollouts) -> None:
    """Provider of every ``divergence.*``: both models' distributions at each token, before the update."""
    if "divergence.reverse" in rollouts.token:
        return
    found = {name: torch.full_like(rollouts.loss_weights, math.nan) for name in COMPARISONS}
    for teacher, rows in module.lessons(rollouts):
        part = rollouts.select(rows)
        for index in module.micro_batch_rows(part):
            micro = part.select(index)
            wanted = micro.kept_mask()
            with evaluation_mode(module.model):
                mine = states_under(module.model, micro.prompts.ids, micro, wanted)
            theirs = module.states_of(teacher, micro, wanted)
            views = View(mine.hidden, mine.head), View(theirs.hidden, theirs.head)
            compared = compare(*views, temperature=module.loss_temperature)
            for name, values in compared._asdict().items():
                found[name][rows[index][theirs.row], theirs.token] = values.to(found[name].dtype)
    rollouts.token |= {f"divergence.{name}": values for name, values in found.items()}


class TaughtPolicyTerm(PolicyTerm):
    """A policy term whose advantages come from the teacher: tokens that it did not score are not trained."""

    def __init__(self, surrogate: Any, correction: Any = None, **kwargs: Any) -> None:
        super().__init__(surrogate, correction, **kwargs)
        self.requires = self.requires | {"logprobs.teacher", "logprobs.old"}

    def trained(self, batch: Rollouts) -> Tensor:
        return torch.where(torch.isnan(batch.logprobs["teacher"]), 0.0, super().trained(batch))


class DivergenceTerm(TokenTerm):
    """The divergence between the teacher's and the policy's next-token distributions, differentiated directly.

    The teacher reads each micro-batch right before it is compared, so its distributions exist a few tokens at a time.

    Args:
        module: the method, which knows the teachers.
        divergence: which divergence.
        kwargs: arguments of `TokenTerm`.
    """

    name = "distill"
    needs_states = True

    def __init__(self, module: Taught, divergence: Divergence, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.module, self.divergence = module, divergence
        for teacher in module.teachers:
            teacher.require_states()

    def trained(self, batch: Rollouts) -> Tensor:
        return super().trained(batch) * self.module.taught(batch)[:, None]

    def values(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        states = current.states
        assert states is not None
        trained = self.trained(batch) != 0
        weights, _ = self.averaging(batch)
        values = current.logprobs.new_zeros(trained.shape)
        for teacher, rows in self.module.lessons(batch):
            wanted = torch.zeros_like(trained)
            wanted[rows] = trained[rows]
            here = wanted[states.row, states.token].nonzero()[:, 0]  # both models' states are in reading order
            theirs = self.module.states_of(teacher, batch, wanted)
            found = vocabulary_divergence(
                View(states.hidden[here], states.head),
                View(theirs.hidden, theirs.head),
                self.divergence,
                temperature=self.module.loss_temperature,
                weights=weights[theirs.row, theirs.token],
                notes=(notes := Notes()),
            )
            self.report(notes, states.head.vocab_size, signals)
            values = values.to(found.dtype).index_put((theirs.row, theirs.token), found)
        signals.mean("distill/divergence", values, trained)
        signals.largest("distill/divergence_max", values, trained)
        if self.divergence.entry_clip is not None:
            signals.mean("distill/negative_ratio", (values.detach() < 0).float(), trained)
        return values

    def report(self, notes: Notes, vocabulary: int, signals: Signals) -> None:
        """Log what was seen beside the divergence."""
        names = {"student_entropy": "student_entropy", "teacher_entropy": "teacher_entropy", "reverse": "reverse_kl"}
        names |= {name: f"top_k_{name}" for name in ("student_mass", "teacher_mass", "overlap")}
        for name, logged in names.items():
            if name in notes:
                signals.mean(f"distill/{logged}", notes[name].nan_to_num(0.0), ~torch.isnan(notes[name]))
        if "reverse" in notes:
            everywhere = torch.ones_like(notes["reverse"], dtype=torch.bool)
            signals.largest("distill/reverse_kl_max", notes["reverse"], everywhere)
        if "clipped" in notes:
            clipped = notes["clipped"]
            everywhere = torch.ones_like(clipped, dtype=torch.bool)
            signals.mean("distill/clipped_ratio", clipped / vocabulary, everywhere)
            signals.mean("distill/clipped_token_ratio", (clipped > 0).float(), everywhere)

    def describe(self) -> str:
        return f"{self.divergence.describe()}; {self.aggregation.value.replace('_', ' ')}"
