# SPDX-License-Identifier: Apache-2.0
"""Rewards that read nothing but the text or its length: format, length, repetition, overlong, exact match."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward, RewardExample, RewardInput, RewardSetupError
from lit_rl.rewards.rows import PerRowReward, only_finished, zero_unfinished


class FormatReward(PerRowReward):
    """``match`` where a regular expression matches the completion, ``mismatch`` elsewhere.

    Args:
        pattern: regular expression; ``.`` also matches line breaks.
        full: whether the whole completion must match, apart from white space around it, or a part is enough.
        match: value of a completion that matches.
        mismatch: value of one that does not.
        isolate: run in worker processes: for a pattern that may take for ever on some text.
        timeout: seconds for one row, if isolated.
        name: see `Reward`.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    def __init__(
        self,
        pattern: str,
        full: bool = True,
        match: float = 1.0,
        mismatch: float = 0.0,
        isolate: bool = False,
        timeout: float = 5.0,
        name: str = "format",
        weight: float = 1.0,
        verifier: bool = False,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, verifier, sources, isolate=isolate, timeout=timeout)
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}.") from error
        self.full = full
        self.match = match
        self.mismatch = mismatch

    def score_row(self, completion: str, **columns: Any) -> float:
        found = self.pattern.fullmatch(completion.strip()) if self.full else self.pattern.search(completion)
        return self.match if found else self.mismatch


class ExactMatchReward(PerRowReward):
    """1 where the text after the last marker is exactly the gold answer, 0 elsewhere.

    Args:
        answer_column: dataset column with the gold answer; a row without one (None) is not scorable.
        marker: what announces the answer; a completion without it scores 0. Empty: the whole completion is the answer.
            (Not None: where a type allows None, YAML reads the marker ``#`` as an empty comment.)
        require_finished: whether a completion that did not end by itself scores 0.
        strip: whether white space around both answers is ignored.
        name: see `Reward`.
        weight: see `Reward`.
        verifier: see `Reward`.
        sources: see `Reward`.
    """

    def __init__(
        self,
        answer_column: str = "answer",
        marker: str = "#",
        require_finished: bool = True,
        strip: bool = True,
        name: str = "exact_match",
        weight: float = 1.0,
        verifier: bool = True,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, verifier, sources)
        self.answer_column = answer_column
        self.requires_columns = (answer_column,)
        self.marker = marker
        self.require_finished = require_finished
        self.strip = strip

    def score_row(self, completion: str, **columns: Any) -> float | None:
        gold = columns[self.answer_column]
        if gold is None:
            return None
        found, gold = self.answer(completion), str(gold)
        return float(found == (gold.strip() if self.strip else gold))

    def answer(self, completion: str) -> str | None:
        """The text after the last marker; None without a marker."""
        if self.marker and self.marker not in completion:
            return None
        found = completion.rpartition(self.marker)[2] if self.marker else completion
        return found.strip() if self.strip else found

    def answers(self, batch: RewardInput) -> Sequence[Hashable | None]:
        found = [self.answer(completion) for completion in batch.completions]
        return only_finished(found, batch) if self.require_finished else found

    def score(self, batch: RewardInput) -> Sequence[float | None]:
        values = super().score(batch)
        return zero_unfinished(values, batch) if self.require_finished else values

    def known_examples(self) -> Sequence[RewardExample]:
        marker, columns = self.marker, {self.answer_column: "42"}
        examples = [
            RewardExample(f"{marker}42", 1.0, columns),
            RewardExample(f"{marker}43", 0.0, columns),
            RewardExample(f"{marker}42", 0.0 if self.require_finished else 1.0, columns, finished=False),
        ]
        if self.marker:
            examples.append(RewardExample("", 0.0, columns))
        return examples


class LengthReward(Reward):
    r"""A value that depends on the length alone, with l = length / max_length, not beyond 1.

    ``linear``: :math:`start + (end - start)\, l`. ``cosine``: :math:`end + (start - end)(1 + \cos \pi l) / 2`, the
    interpolation of Yeo et al. (arXiv 2502.03373, without its dependence on correctness). ``target``:
    :math:`-|length - target| / max\_length`, the penalty of L1-Exact (arXiv 2503.04697) with its coefficient in units
    of the budget. The lengths are those that count, after any truncation.

    Args:
        shape: ``linear``, ``cosine`` or ``target``.
        start: value of an empty completion (``linear`` and ``cosine``).
        end: value of a completion that uses up the budget (``linear`` and ``cosine``).
        target: wanted length in tokens (``target``).
        target_column: dataset column that holds the wanted length of each row, instead of ``target``.
        max_length: length in tokens at which ``end`` is reached; by default the completion budget of the run.
        name: see `Reward`.
        weight: see `Reward`.
        sources: see `Reward`.

    Raises:
        ValueError: an argument is missing or out of range.
    """

    def __init__(
        self,
        shape: Literal["linear", "cosine", "target"] = "linear",
        start: float = 1.0,
        end: float = 0.0,
        target: float | None = None,
        target_column: str | None = None,
        max_length: int | None = None,
        name: str = "length",
        weight: float = 1.0,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, sources=sources)
        if shape not in ("linear", "cosine", "target"):
            raise ValueError(f"shape must be 'linear', 'cosine' or 'target', got {shape!r}.")
        if (shape == "target") != ((target is None) != (target_column is None)):
            raise ValueError("shape='target' needs exactly one of target and target_column; other shapes need neither.")
        _check_positive("max_length", max_length)
        self.shape = shape
        self.start = start
        self.end = end
        self.target = target
        self.target_column = target_column
        self.requires_columns = () if target_column is None else (target_column,)
        self.max_length = max_length

    def score(self, batch: RewardInput) -> Tensor:
        budget = _budget(self, batch)
        lengths = batch.lengths.cpu().double()
        if self.shape == "target":
            wanted = batch.columns[self.target_column] if self.target_column else [self.target] * len(batch)
            targets = torch.tensor([math.nan if w is None else float(w) for w in wanted], dtype=torch.double)
            return -(lengths - targets).abs() / budget
        used = (lengths / budget).clamp(max=1)
        if self.shape == "linear":
            return self.start + (self.end - self.start) * used
        return self.end + (self.start - self.end) * (1 + torch.cos(math.pi * used)) / 2


class OverlongReward(Reward):
    r"""Soft punishment of long completions (DAPO, arXiv 2503.14476, eq. 13).

    With L the length, M = ``max_length`` and C = ``buffer``: 0 up to M - C, then (M - C - L) / C.

    Args:
        buffer: width of the punished zone in tokens, C.
        max_length: M in tokens; by default the completion budget of the run.
        floor: whether the value stops at -1 beyond M (as in the paper and in TRL) or goes on falling (as in verl).
        name: see `Reward`.
        weight: see `Reward`.
        sources: see `Reward`.

    Raises:
        ValueError: ``buffer`` or ``max_length`` is not positive, or ``buffer`` is larger than ``max_length``.
    """

    def __init__(
        self,
        buffer: int,
        max_length: int | None = None,
        floor: bool = True,
        name: str = "overlong",
        weight: float = 1.0,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, sources=sources)
        _check_positive("buffer", buffer)
        _check_positive("max_length", max_length)
        if max_length is not None and buffer > max_length:
            raise ValueError(f"buffer ({buffer}) must not be larger than max_length ({max_length}).")
        self.buffer = buffer
        self.max_length = max_length
        self.floor = floor

    def score(self, batch: RewardInput) -> Tensor:
        budget = _budget(self, batch)
        if self.buffer > budget:
            raise RewardSetupError(
                f"buffer ({self.buffer}) of reward {self.name!r} is larger than the completion budget ({budget})."
            )
        values = ((budget - self.buffer - batch.lengths.cpu().double()) / self.buffer).clamp(max=0)
        return values.clamp(min=-1) if self.floor else values


class RepetitionReward(Reward):
    r"""Punishes repeated n-grams: :math:`-(1 - distinct / all)`, 0 without repetition (Yeo et al., arXiv 2502.03373).

    Args:
        n: size of the n-grams.
        unit: what an n-gram consists of: ``token`` ids, or lower-case ``word`` s.
        name: see `Reward`.
        weight: see `Reward`; the largest punishment.
        sources: see `Reward`.

    Raises:
        ValueError: ``n`` is not positive or ``unit`` does not exist.
    """

    def __init__(
        self,
        n: int = 4,
        unit: Literal["token", "word"] = "token",
        name: str = "repetition",
        weight: float = 1.0,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, sources=sources)
        _check_positive("n", n)
        if unit not in ("token", "word"):
            raise ValueError(f"unit must be 'token' or 'word', got {unit!r}.")
        self.n = n
        self.unit = unit

    def score(self, batch: RewardInput) -> Sequence[float]:
        texts: Sequence[Sequence[Any]] = batch.completion_ids
        if self.unit == "word":
            texts = [completion.lower().split() for completion in batch.completions]
        return [-self._repeated(text) for text in texts]

    def _repeated(self, text: Sequence[Any]) -> float:
        grams = list(zip(*(text[i:] for i in range(self.n))))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _budget(reward: LengthReward | OverlongReward, batch: RewardInput) -> int:
    budget = reward.max_length if reward.max_length is not None else batch.max_length
    if budget is None:
        raise RewardSetupError(f"Reward {reward.name!r} does not know the completion budget; set its max_length.")
    return budget


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
