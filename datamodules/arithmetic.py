# SPDX-License-Identifier: Apache-2.0
"""Generated additions: endless problems for reinforcement learning, and demonstrations by a careless teacher."""

from __future__ import annotations

import random
from string import ascii_lowercase
from typing import Any

from lit_rl.data import EvalSet, GeneratedStream, ListStream, PromptDataModule, Record
from lit_rl.datamodules.carry_addition import draw_operands, is_held_out, problem, solution
from lit_rl.seeding import mix_seeds

TRIES = 10_000


class ArithmeticDataModule(PromptDataModule):
    """Additions such as ``57+68=``. Columns: ``answer`` (text) and the operands ``a``, ``b``, …

    Training problems never end. Validation problems are held out by a hash of their operands in any order, so that no
    training problem, swapped or not, is among them; they do not depend on ``seed``.

    Args:
        digits: smallest and largest number of digits of an operand.
        operands: how many numbers are added.
        seed: decides the training problems.
        held_out: fraction of all problems that training never sees.
        val_size: number of validation problems; 0: no validation.
        val_samples: completions of each validation problem.
        val_temperature: sampling temperature of validation; None: as in training.
        eval_batch_size: prompts of one evaluation batch on one rank.
    """

    def __init__(
        self,
        digits: tuple[int, int] = (2, 3),
        operands: int = 2,
        seed: int = 0,
        held_out: float = 0.1,
        val_size: int = 256,
        val_samples: int = 1,
        val_temperature: float | None = None,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__(eval_batch_size)
        if not 1 <= digits[0] <= digits[1] <= 18:
            raise ValueError(f"digits must be (smallest, largest) with 1 <= smallest <= largest <= 18, got {digits}.")
        if not 2 <= operands <= 9:
            raise ValueError(f"operands must be between 2 and 9 (a carry is one digit), got {operands}.")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is a fraction and must be strictly between 0 and 1, got {held_out}.")
        if val_size < 0:
            raise ValueError(f"val_size must not be negative, got {val_size}; 0 means no validation.")
        self.digits, self.operands, self.seed = (digits[0], digits[1]), operands, seed
        self.held_out, self.val_size = held_out, val_size
        self.val_samples, self.val_temperature = val_samples, val_temperature
        self.validation = self.validation_records()

    def build(self, stage: str) -> None:
        self.train_stream = GeneratedStream(self.generate, mix_seeds(self.seed, type(self).__name__), "arithmetic")
        if self.validation:
            stream = ListStream(self.validation, shuffle=False, source="arithmetic")
            sampling: dict[str, Any] = {"samples": self.val_samples, "temperature": self.val_temperature}
            self.eval_sets = [EvalSet("arithmetic", stream, **sampling)]

    def generate(self, rng: random.Random) -> Record:
        """A training problem."""
        return as_record(self.draw(rng, held_out=False))

    def draw(self, rng: random.Random, held_out: bool) -> list[int]:
        """Operands of a problem on one side of the split."""
        for _ in range(TRIES):
            operands = draw_operands(rng, self.digits, self.operands)
            if is_held_out(operands, self.held_out) == held_out:
                return operands
        side, change = ("held-out", "raise") if held_out else ("training", "lower")
        raise ValueError(f"No {side} problem in {TRIES} tries: {change} held_out={self.held_out} or widen digits.")

    def validation_records(self) -> list[Record]:
        """Different held-out problems, the same for every seed."""
        rng = random.Random(mix_seeds("arithmetic validation"))
        chosen: dict[tuple[int, ...], list[int]] = {}
        for _ in range(50 * self.val_size):
            if len(chosen) == self.val_size:
                break
            operands = self.draw(rng, held_out=True)
            chosen.setdefault(tuple(sorted(operands)), operands)
        if len(chosen) < self.val_size:
            raise ValueError(
                f"val_size={self.val_size}, but only {len(chosen)} held-out problems with digits={self.digits} were "
                "found: lower val_size, raise held_out or widen digits."
            )
        return [as_record(operands) for operands in chosen.values()]


class ArithmeticDemonstrations(ArithmeticDataModule):
    """The same problems with the careless teacher's solutions in the column ``completion``, for a warm start.

    Validation problems have no solutions: the policy writes its own.

    Args:
        first_correct: probability that the teacher's first pass forgets no carry.
        later_correct: the same for later passes.
        another: probability of another pass after each pass.
        answer_only: probability of the true answer alone.
        redundant: how many times the last pass is repeated without need.
        verbose: probability that a column is stated twice.
        kwargs: arguments of `ArithmeticDataModule`.
    """

    def __init__(
        self,
        first_correct: float = 0.1,
        later_correct: float = 0.95,
        another: float = 0.4,
        answer_only: float = 0.15,
        redundant: int = 0,
        verbose: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher: dict[str, Any] = {
            "first_correct": first_correct,
            "later_correct": later_correct,
            "another": another,
            "answer_only": answer_only,
            "verbose": verbose,
        }
        for name, probability in self.teacher.items():
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is a probability and must be between 0 and 1, got {probability}.")
        if another == 1:
            raise ValueError("another=1 would never end a solution: use a smaller probability.")
        if redundant < 0:
            raise ValueError(f"redundant must not be negative, got {redundant}.")
        self.teacher["redundant"] = redundant

    def generate(self, rng: random.Random) -> Record:
        """A training problem with a solution."""
        operands = self.draw(rng, held_out=False)
        return {**as_record(operands), "completion": solution(rng, *operands, **self.teacher)}


def as_record(operands: list[int]) -> Record:
    """A problem with its answer and operands as columns."""
    return {"prompt": problem(operands), "answer": str(sum(operands)), **dict(zip(ascii_lowercase, operands))}
