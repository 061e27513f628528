# SPDX-License-Identifier: Apache-2.0
"""MATH: competition problems with LaTeX answers (arXiv 2103.03874)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_rl.data import Record
from lit_rl.datamodules import formats
from lit_rl.datamodules.gsm8k import BOXED
from lit_rl.datamodules.sources import EvalSource, PromptTemplate, Source, hold_out
from lit_rl.datamodules.text import TextDataModule


class MATHDataModule(TextDataModule):
    """MATH with ``problem``, ``answer`` (LaTeX) and ``solution`` as columns; score it with ``backend: math_verify``.

    A part of the training problems is held out for validation; ``lit-rl test`` and ``lit-rl predict`` go through
    MATH-500, which is taken from the test problems (arXiv 2305.20050).

    Args:
        path: hub id, file or folder of the training problems.
        test_path: hub id, file or folder of the test problems.
        levels: difficulties to train and validate on, out of 1 to 5; default: all.
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
        path: str = "DigitalLearningGmbH/MATH-lighteval",
        test_path: str = "HuggingFaceH4/MATH-500",
        levels: Sequence[int] = (),
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
        if not set(levels) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"levels of MATH go from 1 to 5, got {list(levels)}.")
        read = demonstration if demonstrations else formats.math
        filters: list[Callable[[Record], bool]] = [Levels(levels)] if levels else []
        train = Source(path, name="math", map=read, filters=filters, limit=limit)
        sampling: dict[str, Any] = {"samples": samples, "temperature": temperature}
        official = EvalSource(test_path, name="math500", map=formats.math, **sampling)
        train, validation = hold_out(train, official, held_out, val_limit)
        template = [{"role": "user", "content": BOXED}] if template is None else template
        super().__init__(train, [validation, *val], [official, *test], template, seed, eval_batch_size)


class Levels:
    """A filter: problems of some difficulties, whose column ``level`` is a number or a text such as ``Level 5``.

    Args:
        levels: the difficulties.

    >>> Levels([4, 5])({"level": "Level 5"}), Levels([1])({"level": 2}), Levels([1])({"level": "Level ?"})
    (True, False, False)
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self.levels = {str(level) for level in levels}

    def __call__(self, record: Record) -> bool:
        """Whether to keep a record."""
        return str(record["level"]).removeprefix("Level ") in self.levels


def demonstration(record: Record) -> Record:
    """A row of MATH with its solution, which ends in a box, as the completion."""
    record = formats.math(record)
    return {**record, "completion": record["solution"]}
