# SPDX-License-Identifier: Apache-2.0
"""CaOPD: distil the reasoning from the teacher and the confidence from the facts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rl.hooks import RolloutCallback
from lit_rl.methods.terms import PolicyTerm
from lit_rl.metrics.calibration import CalibrationMetrics
from lit_rl.rollouts import Origin, Rollouts, StopReason

_LINE = re.compile(r"\n?confidence:", re.IGNORECASE)
_SPOKEN = re.compile(r"confidence:\s*([0-9]*\.?[0-9]+)\s*(%?)", re.IGNORECASE)

CONFIDENCE_TEMPLATE = """{prompt}

Here is a demonstration of a good answer:
{solution}

The model that you help answers this question correctly in a fraction {confidence} of its attempts. State exactly this
value in the confidence field.

Now answer the question in your own words, in the format asked for above."""


def without_confidence(text: str) -> str:
    """The text up to the first confidence line, without blanks at its end."""
    found = _LINE.search(text)
    return (text if found is None else text[: found.start()]).rstrip()


def with_confidence(text: str, confidence: float) -> str:
    """The text with exactly one confidence line, at its end.

    >>> with_confidence("work\\nconfidence: 0.99 and more\\nConfidence: 1.00", 0.375)
    'work\\nConfidence: 0.38'
    """
    return f"{without_confidence(text)}\nConfidence: {confidence:.2f}".lstrip("\n")


def spoken_confidence(text: str) -> float:
    """The number after the last ``Confidence:`` as a fraction, NaN if there is none. ``90 %`` is 0.9.

    A number that is no fraction (``Confidence: 2558``) is not a confidence either: one such completion would outweigh
    all others in a mean. How many are left is logged (``confidence_spoken``).
    """
    found = _SPOKEN.findall(text)
    if not found:
        return math.nan
    number, percent = found[-1]
    fraction = float(number) / (100 if percent else 1)
    return fraction if fraction <= 1 else math.nan


class CalibratedOPD(RolloutCallback):
    r"""CaOPD (arXiv 2604.16830): the confidence that a completion ends with becomes the measured success rate.

    A teacher that sees the solution is rightly confident, and a student that copies its tone becomes overconfident.
    Here reasoning and answer still come from the teacher, but the spoken confidence becomes :math:`\hat\mu(x)`, the
    share of right completions of the prompt, in three places: in the student's completion (from the first
    ``Confidence:`` on, the rest is deleted), in the demonstrations that the teacher is shown, and in a note in its
    prompt, which the template shows as ``{confidence}``. Right and wrong completions get the same line.

    The text is then no sample of the policy: use a divergence (``loss="gkd"``), not a ratio. Tokens that were sampled
    stay as they are; only the new line is tokenised. Rewritten rows have the origin ``TEACHER``. A prompt without any
    verdict is left alone.

    In validation it measures Brier score, calibration error, overconfidence and ranking of the spoken confidences.

    Deviation: a body that leaves no room for the line is shortened by as many tokens as needed, not by 80 characters at
    a time.

    Args:
        demonstrations: columns of texts whose confidence is replaced, too.
        skip_tokens: first tokens of each completion that do not train: privileged teachers like stock openings.
        rewrite: False only measures (plain self-distillation).
    """

    requires = frozenset({"correct"})
    adds_columns = ("confidence",)

    def __init__(self, demonstrations: Sequence[str] = (), skip_tokens: int = 3, rewrite: bool = True) -> None:
        if skip_tokens < 0:
            raise ValueError(f"skip_tokens counts tokens, got {skip_tokens}.")
        self.demonstrations, self.skip_tokens, self.rewrite = list(demonstrations), skip_tokens, rewrite
        self.metric = CalibrationMetrics()

    def check_setup(self, module: Any) -> None:
        """Refuse losses that compare with the sampler, and groups that cannot measure anything."""
        if not self.rewrite:
            return
        if any(isinstance(term, PolicyTerm) for term in module.loss_terms):
            raise ValueError(
                f"CalibratedOPD rewrites completions, so that their log-probabilities are no sampler's; the loss of "
                f"{type(module).__name__} needs those. Use a divergence: OPD or OPSD with loss='gkd'."
            )
        if module.group_size < 2:
            raise ValueError(
                "CalibratedOPD measures a success rate from the completions of a prompt: raise group_size (paper: 8)."
            )

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Measure, rewrite completions and what the teacher is shown, and silence the first tokens."""
        texts = module.tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True)
        spoken = torch.tensor([spoken_confidence(text) for text in texts])
        rates = rollouts.group_mean(rollouts.correct.double())
        ledger = module.ledger
        ledger.mean("caopd/success_rate", rates.float())
        ledger.mean("caopd/spoken_ratio", (~torch.isnan(spoken)).float())
        ledger.mean("caopd/confidence", spoken)
        ledger.mean("caopd/overconfidence", spoken - rollouts.correct.cpu())
        if self.rewrite:
            rollouts = self.rewritten(module, rollouts, rates)
        if self.skip_tokens:
            late = torch.arange(rollouts.width, device=rollouts.device) >= self.skip_tokens
            rollouts.loss_weights = rollouts.loss_weights * late
        return rollouts

    def rewritten(self, module: Any, rollouts: Rollouts, rates: Tensor) -> Rollouts:
        """A batch in which every completion and demonstration states the measured rate."""
        known = ~torch.isnan(rates)
        lines = [f"{rate:.2f}" if known[g] else None for g, rate in enumerate(rates.tolist())]
        columns = {**rollouts.prompts.columns, "confidence": list(lines)}
        for name in self.demonstrations:
            columns[name] = [
                text if text is None or not known[g] else with_confidence(text, float(rates[g]))
                for g, text in enumerate(columns[name])
            ]
        prompts = replace(rollouts.prompts, columns=columns)
        completions: list[list[int]] = []
        lines_of, shortened = [], 0
        for row, ids in enumerate(rollouts.completions()):
            g, line = int(rollouts.group[row]), list[int]()
            if known[g]:
                ids, line = self.parts(module, ids, float(rates[g]))
                room = max(module.sampling.max_tokens - len(line), 0)
                shortened += len(ids) > room
                ids = ids[:room]
            completions.append([*ids, *line])
            lines_of.append(len(line))
        module.ledger.total("caopd/shortened", float(shortened))
        return self.assemble(replace(rollouts, prompts=prompts), known[rollouts.group], completions, lines_of)

    def parts(self, module: Any, ids: list[int], rate: float) -> tuple[list[int], list[int]]:
        """Sampled tokens that stay, and the tokens of the new end: what a cut token held, the line, the end token."""
        tokenizer = module.tokenizer
        body = without_confidence(tokenizer.decode(ids, skip_special_tokens=True))
        low, high = 0, len(ids)  # as many tokens as spell a beginning of the body
        while low < high:
            middle = (low + high + 1) // 2
            if body.startswith(tokenizer.decode(ids[:middle], skip_special_tokens=True)):
                low = middle
            else:
                high = middle - 1
        rest = body[len(tokenizer.decode(ids[:low], skip_special_tokens=True)) :]
        stays = ids[: low - 1] if low and ids[low - 1] == tokenizer.eos_token_id else ids[:low]
        line = with_confidence("", rate)
        end = f"{rest}\n{line}" if body else line
        return stays, [*tokenizer(end, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    @staticmethod
    def assemble(rollouts: Rollouts, changed: Tensor, completions: list[list[int]], lines: list[int]) -> Rollouts:
        """The batch with other completions, whose last ``lines`` tokens are new. Weights and masks of the rest stay.

        Other signals of tokens are gone: they belong to the old completions.
        """
        ids = [torch.tensor(x, dtype=torch.long) for x in completions]
        fresh = Rollouts.build(rollouts.prompts, rollouts.group.cpu(), ids).to(rollouts.device)
        for name in ("completion_mask", "loss_weights"):
            for i, (x, line) in enumerate(zip(completions, lines)):
                fresh.token[name][i, : len(x) - line] = rollouts.token[name][i, : len(x) - line]
        row = {**rollouts.row, "lengths": fresh.lengths}
        end = {"stop_reason": int(StopReason.END), "finished": True, "origin": int(Origin.TEACHER)}
        row |= {name: torch.where(changed, value, rollouts.row[name]) for name, value in end.items()}
        return replace(rollouts, row=row, token=fresh.token)

    # Validation ----------------------------------------------------------------------------------------------------

    def on_evaluation_batch(self, trainer: Any, module: Any, rollouts: Rollouts) -> None:
        """Read the spoken confidences."""
        texts = module.tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True)
        self.metric.update(torch.tensor([spoken_confidence(text) for text in texts]), rollouts.correct.cpu())

    def on_evaluation_metrics(self, trainer: Any, module: Any, metrics: dict[str, float], prefix: str) -> None:
        """Add what they are worth."""
        metrics |= {f"{prefix}/{name}": float(value) for name, value in self.metric.compute().items()}
        self.metric.reset()
