# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning as a method: demonstrations instead of samples, the rest of the step is the same."""

from __future__ import annotations

from typing import Any

from lit_rl.methods.module import RLModule
from lit_rl.methods.terms import LikelihoodTerm, Term
from lit_rl.objectives import Aggregation
from lit_rl.policies import Policy
from lit_rl.rollouts import Origin, Rollouts
from lit_rl.samplers.base import RolloutSampler
from lit_rl.samplers.dataset import DatasetSampler


class SFT(RLModule):
    """Maximise the likelihood of the completions in the dataset's ``completion`` column.

    Validation samples from the policy and scores like any other method, if rewards are given.

    Args:
        policy: the language model to train.
        sampler: where demonstrations come from in training; default `DatasetSampler`.
        aggregation: how token losses are averaged.
        group_size: demonstrations of each prompt (a dataset row holds one).
        kwargs: arguments of `RLModule`.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: RolloutSampler | None = None,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        group_size: int = 1,
        keep_entropy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy, sampler=sampler or DatasetSampler(), group_size=group_size, keep_entropy=keep_entropy, **kwargs
        )
        self.aggregation = Aggregation(aggregation)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        column = getattr(self.sampler, "column", None)
        if stage == "fit" and column is not None and column not in self.stream.columns():
            raise ValueError(
                f"SFT trains on completions of the data, but there is no column {column!r}, only "
                f"{sorted(self.stream.columns())}: name the right one in the sampler's `column`."
            )

    def collect(self) -> Rollouts:
        rollouts = super().collect()
        missing = (rollouts.origin == Origin.POLICY).nonzero()[:, 0]
        if len(missing) and not self.interrupted:
            g = int(rollouts.group[missing[0]])
            raise ValueError(
                f"SFT trains on completions of the data, but the prompt {rollouts.prompts.text[g][:80]!r} of source "
                f"{rollouts.prompts.source[g]!r} has none: filter such rows out of the data."
            )
        return rollouts

    def terms(self) -> list[Term]:
        return [LikelihoodTerm(aggregation=self.aggregation)]

    def score(self, rollouts: Any) -> Any:
        """Demonstrations are not scored in training; evaluation scores what the policy samples."""
        return super().score(rollouts) if not self.trainer.training else rollouts
