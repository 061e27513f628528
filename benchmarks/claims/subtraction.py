# SPDX-License-Identifier: Apache-2.0
"""A second task for the small policies, to be kept while additions are learned: subtractions in the same style."""

from __future__ import annotations

import random

from lit_rl.data import EvalSet, GeneratedStream, PromptDataModule, Record
from lit_rl.seeding import mix_seeds

FIRST_CORRECT, LATER_CORRECT, ANOTHER, ANSWER_ONLY = 0.05, 0.95, 0.3, 0.25  # the moods of the quickstart's teacher


def write_pass(a: int, b: int, forget: int | None = None) -> tuple[str, list[int]]:
    """One pass over ``a - b`` from the right: its text and its digits; the borrow of column ``forget`` is dropped.

    >>> write_pass(52, 17)
    ('2-7=5,5-1-1=3', [5, 3])
    """
    above = str(a)[::-1]
    below = str(b)[::-1].ljust(len(above), "0")
    borrow, texts, digits = 0, [], []
    for i, (x, y) in enumerate(zip(above, below, strict=True)):
        difference = int(x) - int(y) - borrow
        texts.append(f"{x}-{y}{'-1' if borrow else ''}={difference % 10}")
        digits.append(difference % 10)
        borrow = int(difference < 0 and i != forget)
    return ",".join(texts), digits


def solution(rng: random.Random, a: int, b: int) -> str:
    """A solution by the careless teacher, who forgets a borrow in nearly every first pass."""
    if rng.random() < ANSWER_ONLY:
        return f"#{a - b}"
    right = write_pass(a, b)[1]
    forgettable = [i for i in range(len(right)) if write_pass(a, b, i)[1] != right]
    passes: list[str] = []
    while True:
        careful = rng.random() < (LATER_CORRECT if passes else FIRST_CORRECT) or not forgettable
        text, digits = write_pass(a, b, None if careful else rng.choice(forgettable))
        passes.append(text)
        if rng.random() >= ANOTHER:
            return f">{'?'.join(passes)}#{int(''.join(map(str, reversed(digits))))}"


class SubtractionDataModule(PromptDataModule):
    """Prompts such as ``52-17=`` with ``answer``, and ``completion`` if they are replayed.

    Args:
        replay: whether training prompts carry a solution; False adds the evaluation set only.
        seed: decides the training problems.
        val_size: number of held-out problems.
    """

    def __init__(self, replay: bool = True, seed: int = 0, val_size: int = 256) -> None:
        super().__init__(eval_batch_size=256)
        self.replay, self.seed, self.val_size = replay, seed, val_size

    def build(self, stage: str) -> None:
        if self.replay:
            self.train_stream = GeneratedStream(self.demonstration, mix_seeds(self.seed, "subtraction"), "subtraction")
        held_out = GeneratedStream(lambda rng: self.problem(rng, 1), mix_seeds("subtraction validation"), "subtraction")
        self.eval_sets = [EvalSet("subtraction", held_out, limit=self.val_size, samples=4)]

    def problem(self, rng: random.Random, side: int) -> Record:
        """A problem of one side of the split, with two or three digits."""
        while True:
            a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(2, 3), rng.randint(2, 3)))
            if a >= b and (mix_seeds(a, b) % 10 == 0) == bool(side):
                return {"prompt": f"{a}-{b}=", "answer": str(a - b), "a": a, "b": b}

    def demonstration(self, rng: random.Random) -> Record:
        """A training problem with its solution."""
        record = self.problem(rng, 0)
        return {**record, "completion": solution(rng, record["a"], record["b"])}
