# SPDX-License-Identifier: Apache-2.0
"""GSM8K: grade-school word problems with whole numbers as answers (arXiv 2110.14168)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_rl.data import Record
from lit_rl.datamodules import formats
from lit_rl.datamodules.sources import EvalSource, PromptTemplate, Source, hold_out
from lit_rl.datamodules.text import TextDataModule

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class GSM8KDataModule(TextDataModule):
    """GSM8K with ``problem``, ``answer`` (the number) and ``solution`` as columns.

    A part of the training problems is held out for validation, so that the test problems choose no checkpoint; they are
    what ``lit-rl test`` and ``lit-rl predict`` go through.

    Args:
        path: hub id, or a folder with ``train.jsonl`` and ``test.jsonl`` (or in hub format).
        subset: configuration of the hub dataset.
        template: prompt template, see `Source`; default: a user message with the problem, a request to reason step by
            step and one for a boxed answer. A text (instead of messages) suits a base model.
        demonstrations: give the worked solutions as the column ``completion``, for supervised training.
        held_out: share of the training problems to validate on; 0: validate on the test problems.
        limit: number of training problems.
        val_limit: number of validation problems.
        samples: completions of each evaluation problem.
        temperature: sampling temperature of evaluation; None: as in training.
        val: further sets to validate on.
        test: further sets to test on.
        seed: decides the order of the training problems.
        eval_batch_size: prompts of one evaluation batch on one rank.
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        subset: str | None = "main",
        template: PromptTemplate | None = None,
        demonstrations: bool = False,
        held_out: float = 0.05,
        limit: int | None = None,
        val_limit: int | None = None,
        samples: int = 1,
        temperature: float | None = None,
        val: Sequence[EvalSource] = (),
        test: Sequence[EvalSource] = (),
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        common: dict[str, Any] = {"path": path, "subset": subset, "name": "gsm8k", "map": formats.gsm8k}
        sampling: dict[str, Any] = {"samples": samples, "temperature": temperature}
        train = Source(**{**common, "map": demonstration if demonstrations else formats.gsm8k}, limit=limit)
        official = EvalSource(**common, **sampling)
        train, validation = hold_out(train, official, held_out, val_limit)
        template = [{"role": "user", "content": BOXED}] if template is None else template
        super().__init__(train, [validation, *val], [official, *test], template, seed, eval_batch_size)


def demonstration(record: Record) -> Record:
    r"""A row of GSM8K with its solution, and the answer in a box, as the completion.

    >>> demonstration({"question": "2 pens for $3?", "answer": "2*3=<<2*3=6>>6\n#### 6"})["completion"]
    '2*3=6\nThe answer is \\boxed{6}.'
    """
    record = formats.gsm8k(record)
    return {**record, "completion": f"{record['solution']}\nThe answer is \\boxed{{{record['answer']}}}."}
