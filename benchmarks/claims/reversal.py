# SPDX-License-Identifier: Apache-2.0
"""A second task for the small policies, to be kept while another one is learned: write digits backwards."""

from __future__ import annotations

import random

from lit_rl.data import EvalSet, GeneratedStream, PromptDataModule, Record
from lit_rl.seeding import mix_seeds


class ReversalDataModule(PromptDataModule):
    """Prompts such as ``4071;``, answered by ``#1704``. Columns: ``answer``, and ``completion`` if it is replayed.

    Args:
        digits: smallest and largest number of digits; held-out problems have no digit string of training.
        replay: whether training prompts carry their completion; False adds the evaluation set only.
        seed: decides the training problems.
        val_size: number of held-out problems.
    """

    def __init__(
        self, digits: tuple[int, int] = (5, 9), replay: bool = True, seed: int = 0, val_size: int = 256
    ) -> None:
        super().__init__(eval_batch_size=256)
        self.digits, self.replay, self.seed, self.val_size = (digits[0], digits[1]), replay, seed, val_size

    def build(self, stage: str) -> None:
        if self.replay:
            self.train_stream = GeneratedStream(self.demonstration, mix_seeds(self.seed, "reversal"), "reversal")
        held_out = GeneratedStream(lambda rng: self.problem(rng, 1), mix_seeds("reversal validation"), "reversal")
        self.eval_sets = [EvalSet("reversal", held_out, limit=self.val_size)]

    def problem(self, rng: random.Random, side: int) -> Record:
        """A problem of one side of the split: the parity of the digit sum."""
        while True:
            text = "".join(rng.choice("0123456789") for _ in range(rng.randint(*self.digits)))
            if sum(map(int, text)) % 2 == side:
                return {"prompt": f"{text};", "answer": text[::-1]}

    def demonstration(self, rng: random.Random) -> Record:
        """A training problem with its solution."""
        record = self.problem(rng, 0)
        return {**record, "completion": f"#{record['answer']}"}
