# SPDX-License-Identifier: Apache-2.0
"""The verifier of mathematical answers: exact numbers without dependencies, or LaTeX through math-verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

from lit_rl.rewards.base import RewardExample, RewardInput
from lit_rl.rewards.latex import check_math_verify, last_answer, match_latex
from lit_rl.rewards.numeric import EXTRACTIONS, Extraction, find_answer, match_numeric
from lit_rl.rewards.rows import PerRowReward, only_finished, zero_unfinished

_PLACES = {
    "boxed": "So it is \\boxed{%s}.",
    "hashes": "So it is.\n#### %s",
    "phrase": "The answer is %s.",
    "last_number": "So %s",
}


class MathReward(PerRowReward):
    """1 where the final answer of a completion is right, 0 where it is wrong or missing.

    A row whose gold answer cannot be read is not scorable.

    Args:
        answer_column: dataset column with the gold answer, or with a solution that ends in it.
        backend: ``numeric`` reads one number exactly (GSM8K and the like, see `lit_rl.rewards.numeric`);
            ``math_verify`` compares LaTeX expressions (MATH and the like) and needs the extra ``math``.
        extraction: for ``numeric``, where the answer may stand, tried in this order: ``boxed``, ``hashes``,
            ``phrase``, ``last_number`` (all by default; leave ``last_number`` out to insist on a stated answer).
        tolerance: for ``numeric``, largest difference relative to the gold answer; 0 is exact.
        require_finished: whether a completion that did not end by itself scores 0.
        timeout: seconds for one row, where it runs isolated.
        isolate: run in worker processes; by default for ``math_verify`` only.
        workers: number of worker processes, if isolated.
        name: see `Reward`.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.

    Raises:
        ImportError: ``backend`` is ``math_verify`` and math-verify is not installed.
        ValueError: an argument does not exist or does not fit the backend.
    """

    def __init__(
        self,
        answer_column: str = "answer",
        backend: Literal["numeric", "math_verify"] = "numeric",
        extraction: list[Extraction] | None = None,
        tolerance: float = 0.0,
        require_finished: bool = False,
        timeout: float = 5.0,
        isolate: bool | None = None,
        workers: int | None = None,
        name: str = "math",
        weight: float = 1.0,
        verifier: bool = True,
        sources: list[str] | None = None,
    ) -> None:
        if backend not in ("numeric", "math_verify"):
            raise ValueError(f"backend must be 'numeric' or 'math_verify', got {backend!r}.")
        places = tuple(EXTRACTIONS if extraction is None else extraction)
        if not places or set(places) - set(EXTRACTIONS):
            raise ValueError(f"extraction must name at least one of {EXTRACTIONS} and nothing else, got {places}.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be 0 (exact) or positive, got {tolerance}.")
        if backend == "math_verify":
            check_math_verify()
            if extraction is not None or tolerance:
                raise ValueError("extraction and tolerance belong to backend='numeric'; leave them out.")
        super().__init__(
            name,
            weight,
            verifier,
            sources,
            isolate=backend == "math_verify" if isolate is None else isolate,
            timeout=timeout,
            workers=workers,
        )
        self.answer_column = answer_column
        self.requires_columns = (answer_column,)
        self.backend = backend
        self.extraction = places
        self.tolerance = tolerance
        self.require_finished = require_finished

    def row_function(self) -> Callable[..., float | None]:
        if self.backend == "math_verify":
            return match_latex
        return partial(match_numeric, extraction=self.extraction, tolerance=self.tolerance)

    def score_row(self, completion: str, **columns: Any) -> float | None:
        return self.row_function()(completion, columns[self.answer_column])

    def score(self, batch: RewardInput) -> Sequence[float | None]:
        answers = batch.columns[self.answer_column]
        values = self.score_calls([(pair, {}) for pair in zip(batch.completions, answers)])
        return zero_unfinished(values, batch) if self.require_finished else values

    def answers(self, batch: RewardInput) -> Sequence[Hashable | None]:
        read = last_answer if self.backend == "math_verify" else partial(find_answer, extraction=self.extraction)
        found = [read(completion) for completion in batch.completions]
        return only_finished(found, batch) if self.require_finished else found

    def verify(self, completion: str, answer: str) -> float:
        """Score one completion against one gold answer: 1.0, 0.0, or NaN if it is not scorable.

        >>> MathReward().verify(r"Half of it: $\\boxed{\\frac{3}{2}}$ cups", "#### 1.5")
        1.0
        """
        value = self.score_calls([((completion, answer), {})])[0]
        return math.nan if value is None else value

    def known_examples(self) -> Sequence[RewardExample]:
        if self.backend == "math_verify":
            right, wrong = "So it is $\\boxed{\\frac{1}{2}}$.", "So it is $\\boxed{\\frac{1}{3}}$."
            cases = [(right, 1.0, True), (wrong, 0.0, True)]
        else:
            cases = [(_PLACES[place] % 42, 1.0, True) for place in self.extraction]
            cases += [(_PLACES[place] % 43, 0.0, True) for place in self.extraction]
        if self.require_finished:
            cases.append((cases[0][0], 0.0, False))
        answer = "0.5" if self.backend == "math_verify" else "42"
        return [RewardExample(text, value, {self.answer_column: answer}, ended) for text, value, ended in cases]
