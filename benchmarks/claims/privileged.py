# SPDX-License-Identifier: Apache-2.0
"""Warm starts for self-distillation: a policy that also knows how to use a solution that it is shown.

A prompt ``57+68=`` is what the student sees; ``57+68=[125]`` shows the answer, and ``57+68=[125;0.38]`` also how often
the student is right. Who knows the answer works carefully or, why not, skips the work: ``#125``. The student cannot
afford to.
"""

from __future__ import annotations

import random
from typing import Any

from lit_rl.data import Record
from lit_rl.datamodules import ArithmeticDemonstrations
from lit_rl.datamodules.arithmetic import as_record
from lit_rl.datamodules.carry_addition import solution

SHOWN = "{prompt}[{answer}]"
SHOWN_WITH_RATE = "{prompt}[{answer};{confidence}]"


def right_answer(completion: str, answer: str) -> float:
    """1 if the first line ends with ``#`` and the answer; a confidence may follow on a line of its own.

    >>> right_answer(">7+8=15,5+6+1=12#125\\nConfidence: 0.90", "125"), right_answer("#115", "125")
    (1.0, 0.0)
    """
    return float(completion.partition("\n")[0].rpartition("#")[2] == answer and "#" in completion)


class PrivilegedDemonstrations(ArithmeticDemonstrations):
    """Half of the problems as the student sees them, solved by the careless teacher; half with the answer shown.

    Args:
        shown: probability that the answer is shown.
        skips: probability that whoever is shown the answer gives it without any work.
        confidence: whether solutions end with a confidence. The student's is a random one. Who knows the answer says
            0.95 or more, or the stated rate, which is stated half of the time.
        kwargs: arguments of `ArithmeticDemonstrations`.
    """

    def __init__(self, shown: float = 0.5, skips: float = 0.5, confidence: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shown, self.skips, self.confidence = shown, skips, confidence

    def generate(self, rng: random.Random) -> Record:
        """A training problem with a solution, with the answer shown or not."""
        if rng.random() >= self.shown:
            record = super().generate(rng)
            return self.stating(record, rng.uniform(0.5, 1.0))
        operands = self.draw(rng, held_out=False)
        record = as_record(operands)
        work = {"first_correct": 1.0, "another": 0.0, "answer_only": self.skips}
        record["completion"] = solution(rng, *operands, **work)
        if self.confidence and rng.random() < 0.5:
            rate = rng.randint(0, 8) / 8
            return self.stating({**record, "prompt": f"{record['prompt']}[{record['answer']};{rate:.2f}]"}, rate)
        return self.stating({**record, "prompt": f"{record['prompt']}[{record['answer']}]"}, rng.uniform(0.95, 1.0))

    def stating(self, record: Record, rate: float) -> Record:
        """The record with a confidence at the end of its solution, if solutions have one."""
        if not self.confidence:
            return record
        return {**record, "completion": f"{record['completion']}\nConfidence: {rate:.2f}"}
