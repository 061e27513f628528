# SPDX-License-Identifier: Apache-2.0
"""Several sources of prompts in one run: to learn one thing and keep others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_rl.data import EvalSet, MixedStream, PromptDataModule, RelabelledStream
from lit_rl.header import summary


class MixtureDataModule(PromptDataModule):
    """Draws from several datamodules, uniformly or by weight, and evaluates on the evaluation sets of all of them.

    Every record's ``source`` is the name that its datamodule has here. Rewards choose what they score by it
    (``sources: [math]``), and metrics of evaluation sets are logged under it. Prompts of a source with a column
    ``completion`` are not sampled for but replayed, if the sampler is a `DatasetSampler`; so tasks that are learned by
    reward and data that is kept by likelihood (``sft_coef`` of `GRPO`) stand side by side.

    Args:
        sources: the datamodules by name. One without training data adds its evaluation sets only. A mixture may be
            part of another; its records then have the name that it has there.
        weights: relative frequency of each source in training; default: all alike.
        seed: decides the order.
        eval_batch_size: prompts of one evaluation batch on one rank.
    """

    def __init__(
        self,
        sources: dict[str, PromptDataModule],
        weights: dict[str, float] | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        super().__init__(eval_batch_size)
        if not sources:
            raise ValueError("A mixture needs at least one source: pass `sources` as a dictionary from name to source.")
        self.sources, self.weights, self.seed = dict(sources), weights, seed

    def describe(self) -> str:
        """The class and its sources."""
        return f"{type(self).__name__}({', '.join(f'{name}: {summary(s)}' for name, s in self.sources.items())})"

    def prepare_data(self) -> None:
        """Download what the sources need."""
        for source in self.sources.values():
            source.prepare_data()

    def build(self, stage: str) -> None:
        for source in self.sources.values():
            source.build(stage)
        streams = {name: source.train_stream for name, source in self.sources.items() if source.trains}
        if stage == "fit" and streams:
            self.train_stream = MixedStream(streams, self.weights, self.seed)
        self.eval_sets = [s for name, source in self.sources.items() for s in named(name, source.eval_sets)]


def named(source: str, eval_sets: Sequence[EvalSet]) -> list[EvalSet]:
    """The evaluation sets of a source, called and labelled as the source is; several as ``<source>.<set>``."""
    names = [source if len(eval_sets) == 1 else f"{source}.{eval_set.name}" for eval_set in eval_sets]
    return [replace(s, name=name, stream=RelabelledStream(s.stream, source)) for s, name in zip(eval_sets, names)]
