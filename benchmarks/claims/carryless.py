# SPDX-License-Identifier: Apache-2.0
"""A second task for the small policies, to be kept while additions are learned: addition without carries.

A problem is ``a:b=``. Its one right solution is a single pass that takes no carry along, ``>7+8=15,5+6=11#115`` for
``57:68=``: exactly what a policy must unlearn for ``57+68=``. Learning to carry there spills over to here.
"""

from __future__ import annotations

import random

from lit_rl.data import EvalSet, GeneratedStream, PromptDataModule, Record
from lit_rl.datamodules.carry_addition import columns_of, draw_operands, is_held_out, read_off, write_pass
from lit_rl.seeding import mix_seeds


def as_record(operands: list[int]) -> Record:
    """A problem with its answer and its solution.

    >>> as_record([57, 68])["completion"]
    '>7+8=15,5+6=11#115'
    """
    columns = columns_of(operands)
    answer = str(read_off([sum(column) for column in columns]))
    prompt = ":".join(map(str, operands)) + "="
    return {"prompt": prompt, "answer": answer, "completion": f">{write_pass(columns)}#{answer}"}


class CarrylessDataModule(PromptDataModule):
    """Prompts such as ``57:68=`` with ``answer``, and ``completion`` if they are replayed.

    Args:
        replay: whether there are training prompts, with their solutions; False adds the evaluation set only.
        digits: smallest and largest number of digits of an operand.
        seed: decides the training problems.
        held_out: fraction of all problems that training never sees.
        val_size: number of held-out problems.
        val_samples: completions of each.
    """

    def __init__(
        self,
        replay: bool = True,
        digits: tuple[int, int] = (2, 3),
        seed: int = 0,
        held_out: float = 0.1,
        val_size: int = 256,
        val_samples: int = 1,
    ) -> None:
        super().__init__(eval_batch_size=256)
        self.replay, self.digits, self.seed = replay, digits, seed
        self.held_out, self.val_size, self.val_samples = held_out, val_size, val_samples

    def build(self, stage: str) -> None:
        if self.replay:
            self.train_stream = GeneratedStream(self.demonstration, mix_seeds(self.seed, "carryless"), "carryless")
        problems = GeneratedStream(self.held_out_problem, mix_seeds("carryless validation"), "carryless")
        self.eval_sets = [EvalSet("carryless", problems, limit=self.val_size, samples=self.val_samples)]

    def draw(self, rng: random.Random, held_out: bool) -> Record:
        """A problem on one side of the split."""
        while True:
            operands = draw_operands(rng, self.digits)
            if is_held_out(operands, self.held_out) == held_out:
                return as_record(operands)

    def demonstration(self, rng: random.Random) -> Record:
        """A training problem with its solution."""
        return self.draw(rng, held_out=False)

    def held_out_problem(self, rng: random.Random) -> Record:
        """A problem that training never sees; the policy writes its own solution."""
        return {k: v for k, v in self.draw(rng, held_out=True).items() if k != "completion"}
