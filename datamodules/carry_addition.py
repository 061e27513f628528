# SPDX-License-Identifier: Apache-2.0
"""The task of the quickstart: long addition in passes, and a careless teacher who forgets carries.

A problem is ``a+b=``. A solution is ``>`` pass (``?`` pass)* ``#`` answer. A pass works column by column from the
right, each column ``x+y[+carry]=t``, joined by commas; the answer is read off the last pass. For ``57+68=``:

    >7+8=15,5+6=11?7+8=15,5+6+1=12#125      (the first pass forgets the carry, the second does not)

A policy that imitates the teacher can discover by reinforcement that a second pass pays, and afterwards that a single
careful pass is as good and half as long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from lit_rl.seeding import mix_seeds


class Column(NamedTuple):
    """One column of a pass: the text left of the last ``=`` and the number right of it."""

    terms: str
    total: int


class Solution(NamedTuple):
    """A solution taken apart."""

    passes: list[list[Column]]
    answer: str


def problem(operands: Sequence[int]) -> str:
    """The prompt.

    >>> problem([57, 68])
    '57+68='
    """
    return "+".join(str(x) for x in operands) + "="


def draw_operands(rng: random.Random, digits: tuple[int, int] = (2, 3), count: int = 2) -> list[int]:
    """Numbers whose number of digits is uniform in ``digits`` (both ends included), uniform given that."""
    lengths = [rng.randint(*digits) for _ in range(count)]
    return [rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in lengths]


def is_held_out(operands: Sequence[int], fraction: float) -> bool:
    """Whether a problem is kept for validation, by a hash of its operands in any order."""
    return mix_seeds("held out", *sorted(operands)) % 10**6 < fraction * 10**6


def columns_of(operands: Sequence[int]) -> list[list[int]]:
    """The digits of each column, from the right; missing digits are 0."""
    texts = [str(x)[::-1] for x in operands]
    return [[int(t[i]) if i < len(t) else 0 for t in texts] for i in range(max(len(t) for t in texts))]


def work_pass(operands: Sequence[int], forget: int | None = None) -> list[list[int]]:
    """Terms of each column (its digits, and the carry if it is not 0).

    Args:
        operands: the numbers to add.
        forget: the column whose carry is not taken along.
    """
    carry, terms = 0, []
    for i, digits in enumerate(columns_of(operands)):
        terms.append([*digits, carry] if carry else digits)
        carry = 0 if i == forget else sum(terms[-1]) // 10
    return terms


def carrying_columns(operands: Sequence[int]) -> list[int]:
    """Columns with a carry that can be forgotten; the last column's is part of its total."""
    return [i for i, terms in enumerate(work_pass(operands)[:-1]) if sum(terms) >= 10]


def read_off(totals: Sequence[int]) -> int:
    """The sum that a pass arrives at, from the totals of its columns.

    >>> read_off([15, 12])
    125
    """
    return int(str(totals[-1]) + "".join(str(t % 10) for t in reversed(totals[:-1])))


def write_pass(terms: Sequence[Sequence[int]], verbose: Sequence[bool] = ()) -> str:
    """The text of a pass; a verbose column is stated a second time, backwards, before its total."""
    texts = []
    for i, column in enumerate(terms):
        forms = [column, column[::-1]] if i < len(verbose) and verbose[i] else [column]
        texts.append("=".join(["+".join(map(str, form)) for form in forms] + [str(sum(column))]))
    return ",".join(texts)


def solution(
    rng: random.Random,
    *operands: int,
    first_correct: float = 0.1,
    later_correct: float = 0.95,
    another: float = 0.4,
    answer_only: float = 0.15,
    redundant: int = 0,
    verbose: float = 0.0,
) -> str:
    """A solution by the careless teacher.

    Args:
        rng: source of its moods.
        operands: the numbers to add.
        first_correct: probability that the first pass forgets no carry.
        later_correct: the same for every later pass.
        another: probability of another pass after each pass.
        answer_only: probability of giving the (true) answer alone.
        redundant: how many times the last pass is said again without need: length that carries no information.
        verbose: probability that a column is stated twice: longer passes that are no more often right.

    Returns:
        The completion, without an end-of-sequence token.
    """
    if rng.random() < answer_only:
        return f"#{sum(operands)}"
    can_forget = carrying_columns(operands)
    passes: list[str] = []
    while True:
        careful = rng.random() < (later_correct if passes else first_correct)
        terms = work_pass(operands, None if careful or not can_forget else rng.choice(can_forget))
        passes.append(write_pass(terms, [rng.random() < verbose for _ in terms]))
        if rng.random() >= another:
            break
    passes += passes[-1:] * redundant
    return f">{'?'.join(passes)}#{read_off([sum(column) for column in terms])}"


def parse_solution(text: str) -> Solution | None:
    """Take a solution apart; None if it is not of the described form. The arithmetic is not checked.

    >>> parse_solution(">7+8=15,5+6+1=12#125").passes[0][1]
    Column(terms='5+6+1', total=12)
    """
    body, marker, answer = text.partition("#")
    if not marker or not (answer.isascii() and answer.isdigit()):
        return None
    if not body:
        return Solution([], answer)
    if not body.startswith(">"):
        return None
    passes = []
    for part in body[1:].split("?"):
        columns = [column.rpartition("=") for column in part.split(",")]
        if not all(terms and total.isascii() and total.isdigit() for terms, _, total in columns):
            return None
        passes.append([Column(terms, int(total)) for terms, _, total in columns])
    return Solution(passes, answer)
