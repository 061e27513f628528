# SPDX-License-Identifier: Apache-2.0
"""Self-distilled RLVR: the verifier decides the direction, a privileged teacher how much each token is credited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.methods.grpo import GRPO
from lit_rl.methods.teaching import Taught
from lit_rl.methods.terms import Current, PolicyTerm, Signals, Term
from lit_rl.objectives import Clip, Surrogate
from lit_rl.policies import FrozenPolicy, Policy, PrivilegedPrompt, Snapshot, Teacher
from lit_rl.rollouts import Rollouts

ANSWER_TEMPLATE = """{prompt}

Here is a reference solution: {answer}

Solve the problem in your own way, in the format asked for above."""


def evidence_weights(advantages: Tensor, gain: Tensor, mixing: float, clip: float) -> Tensor:
    r"""Factors of the tokens' advantages: :math:`(1-\lambda) + \lambda\,clip(e^{sign(A)\Delta}, 1\pm\epsilon)`.

    Args:
        advantages: A, any shape; only the sign counts.
        gain: Δ = log teacher - log student of the sampled token, the same shape; NaN where no teacher scored, which
            leaves the token at 1.
        mixing: λ in [0, 1].
        clip: ε_w.

    Returns:
        Positive factors in [1 - λ ε, 1 + λ ε], without gradient.
    """
    evidence = (advantages.sign() * gain.detach()).exp().clamp(1 - clip, 1 + clip)
    return torch.where(torch.isnan(gain), 1.0, (1 - mixing) + mixing * evidence)


def mixing_at(step: int, target: float, warmup: int, decay: int) -> float:
    """λ at a step: a linear rise over ``warmup`` steps, then a linear fall to 0 over ``decay`` steps (0: none).

    >>> [mixing_at(s, 0.5, 10, 60) for s in (5, 10, 40, 70, 99)]
    [0.25, 0.5, 0.25, 0.0, 0.0]
    """
    if step < warmup:
        return target * step / warmup
    return target * max(1 - (step - warmup) / decay, 0.0) if decay else target


class RLSD(Taught, GRPO):
    r"""RLSD (arXiv 2604.03128): GRPO with token-level credit from a teacher that is shown the answer.

    Pure self-distillation from a privileged teacher leaks: the teacher conditions on what the student can never see.
    Here the teacher's evidence :math:`\Delta_t = \log\pi_T(y_t|x,r) - \log\pi_\theta(y_t|x)` only scales the
    verifier's advantage, :math:`\hat A_t = A\,[(1-\lambda) + \lambda\,clip(e^{sign(A)\Delta_t}, 1\pm\epsilon_w)]`: in
    right completions, tokens that the answer makes likelier are credited more, in wrong ones they are blamed less. The
    sign never changes. Δ is taken from the current policy at each update, as in the official code.

    Args:
        policy: the student.
        prompt: what the teacher sees; default: prompt and reference answer (the column ``answer``).
        teacher: whose weights it has; default a snapshot of the policy every 20 rollout steps.
        mixing: λ (1: the formula of the paper's method section; the released recipe starts at 0.5).
        mixing_warmup: rollout steps over which λ rises to ``mixing``.
        mixing_decay: rollout steps over which it then falls to 0; 0 keeps it (and lets a schedule move ``mixing``).
        evidence_clip: ε_w.
        negative_only: reweigh only completions with a negative advantage.
        only_between: two texts, such as ``<thought>`` and ``</thought>``: reweigh only the tokens between them.
        surrogate: default clip-higher 0.2/0.28; the released code adds the dual clip.
        kwargs: arguments of `GRPO`.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: PrivilegedPrompt | None = None,
        teacher: FrozenPolicy | None = None,
        mixing: float = 0.5,
        mixing_warmup: int = 0,
        mixing_decay: int = 60,
        evidence_clip: float = 0.2,
        negative_only: bool = False,
        only_between: tuple[str, str] | None = None,
        surrogate: Surrogate | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= mixing <= 1:
            raise ValueError(f"mixing must lie in [0, 1], got {mixing}.")
        if not 0 <= evidence_clip < 1:
            raise ValueError(f"evidence_clip must be in [0, 1), or the sign could change; got {evidence_clip}.")
        if mixing_warmup < 0 or mixing_decay < 0:
            raise ValueError(f"mixing_warmup and mixing_decay count steps, got {mixing_warmup} and {mixing_decay}.")
        if isinstance(teacher, Teacher):
            raise ValueError("RLSD makes the Teacher itself: give its policy as `teacher` and its prompt as `prompt`.")
        self.teach_by(Teacher(teacher or Snapshot(every=20), prompt or PrivilegedPrompt(ANSWER_TEMPLATE)))
        super().__init__(policy, surrogate=surrogate or Clip(0.2, 0.28), **kwargs)
        self.mixing, self.mixing_warmup, self.mixing_decay = mixing, mixing_warmup, mixing_decay
        self.evidence_clip, self.negative_only = evidence_clip, negative_only
        self.only_between = None if only_between is None else tuple(only_between)

    def mixing_now(self) -> float:
        """λ at the current rollout step."""
        return mixing_at(self.rollout_step, self.mixing, self.mixing_warmup, self.mixing_decay)

    def terms(self) -> list[Term]:
        first, *others = super().terms()
        assert isinstance(first, PolicyTerm)
        shape: dict[str, Any] = {"aggregation": first.aggregation, "max_length": first.max_length}
        return [EvidenceTerm(self, self.surrogate, self.correction, origins=first.origins, **shape), *others]

    def recall(self, rollouts: Rollouts) -> Rollouts:
        """Also find the tokens that may be reweighed, and report λ and the age of the teacher's weights."""
        rollouts = super().recall(rollouts)
        if self.only_between is not None:
            pieces = [self.tokenizer.batch_decode([[i] for i in ids]) for ids in rollouts.completions(kept=False)]
            inside = torch.zeros(rollouts.loss_weights.shape, dtype=torch.bool)
            for row, texts in enumerate(pieces):
                inside[row, : len(texts)] = torch.tensor(between(texts, *self.only_between), dtype=torch.bool)
            rollouts.token["evidence_mask"] = inside.to(rollouts.device)
        self.ledger.mean("rlsd/lambda", torch.tensor([self.mixing_now()]))
        snapshot = self.teachers[0].policy
        if isinstance(snapshot, Snapshot):
            self.ledger.mean("rlsd/teacher_age", torch.tensor([float(self.rollout_step - snapshot.taken_at)]))
        return rollouts

    def describe(self) -> list[str]:
        low, high = 1 - self.evidence_clip, 1 + self.evidence_clip
        schedule = f", {self.mixing_warmup} steps up" if self.mixing_warmup else ""
        schedule += f", {self.mixing_decay} steps down to 0" if self.mixing_decay else ""
        weight = f"(1 - λ) + λ clip((teacher / policy)^sign(A), {low:g}, {high:g})"
        return [*super().describe(), f"credit: A × [{weight}], λ = {self.mixing:g}{schedule}"]


def between(texts: list[str], start: str, end: str) -> list[bool]:
    """Which of the consecutive pieces of a text begin between a start and an end mark (or after one that never ends).

    >>> between(["a", "<t>", "b", "c", "</t>", "d"], "<t>", "</t>")
    [False, False, True, True, False, False]
    """
    whole, spans, at = "".join(texts), [], 0
    while (begin := whole.find(start, at)) >= 0:
        stop = whole.find(end, begin + len(start))
        stop = len(whole) if stop < 0 else stop
        spans.append((begin + len(start), stop))
        at = stop + len(end)
    out, position = [], 0
    for text in texts:
        out.append(any(a <= position < b for a, b in spans))
        position += len(text)
    return out


class EvidenceTerm(PolicyTerm):
    """The policy term with advantages scaled by the teacher's evidence."""

    def __init__(self, module: RLSD, surrogate: Any, correction: Any = None, **kwargs: Any) -> None:
        super().__init__(surrogate, correction, **kwargs)
        self.module = module
        self.requires = self.requires | {"logprobs.teacher"}

    def credited(self, batch: Rollouts, current: Current, signals: Signals) -> Tensor:
        module, advantages = self.module, batch.advantages
        gain = batch.logprobs["teacher"] - current.logprobs.detach()
        if module.negative_only:
            gain = torch.where(advantages < 0, gain, torch.nan)
        if "evidence_mask" in batch.token:
            gain = torch.where(batch.token["evidence_mask"], gain, torch.nan)
        weights = evidence_weights(advantages, gain, module.mixing_now(), module.evidence_clip)
        self.report(gain, advantages, weights, (self.trained(batch) != 0) & ~torch.isnan(gain), signals)
        return advantages * weights.to(advantages.dtype)

    def report(self, gain: Tensor, advantages: Tensor, weights: Tensor, where: Tensor, signals: Signals) -> None:
        """What the teacher said and how often the clip held it back."""
        ratio, clip = (advantages.sign() * gain).exp(), self.module.evidence_clip
        signals.mean("rlsd/delta_mean", gain, where)
        signals.mean("rlsd/weight_mean", weights, where)
        signals.mean("rlsd/clip_low_frac", (ratio < 1 - clip).float(), where)
        signals.mean("rlsd/clip_high_frac", (ratio > 1 + clip).float(), where)
