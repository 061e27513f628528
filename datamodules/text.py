# SPDX-License-Identifier: Apache-2.0
"""Prompts from tables: files, folders and datasets of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from lit_rl.data import PromptDataModule
from lit_rl.datamodules.sources import EvalSource, PromptTemplate, Source
from lit_rl.header import changed_arguments

SourceT = TypeVar("SourceT", bound=Source)


class TextDataModule(PromptDataModule):
    """Trains on one table and evaluates on any number of others, each with its own sampling settings.

    Several tables are trained on together with `MixtureDataModule`. Records are held in memory.

    Args:
        train: what training draws its prompts from; None: the module only evaluates.
        val: what ``fit`` and ``validate`` evaluate on.
        test: what ``test`` and ``predict`` go through; default: ``val``.
        template: prompt template of every source that has none of its own, see `Source`.
        seed: decides the order of the training prompts.
        eval_batch_size: prompts of one evaluation batch on one rank.
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Sequence[EvalSource] = (),
        test: Sequence[EvalSource] = (),
        template: PromptTemplate | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        super().__init__(eval_batch_size)
        if train is None and not val and not test:
            raise ValueError(f"{type(self).__name__} needs a source: set train, val or test.")
        self.template, self.seed = template, seed
        self.train = None if train is None else self.with_template(train)
        self.val = [self.with_template(source) for source in val]
        self.test = [self.with_template(source) for source in test] or self.val

    def describe(self) -> str:
        """The class, where the prompts of training come from, and the settings that are no defaults."""
        settings = {k: v for k, v in changed_arguments(self).items() if k not in ("train", "val", "test", "template")}
        parts = [] if self.train is None else [self.train.path]
        parts += [f"{name}={value}" for name, value in settings.items()]
        return f"{type(self).__name__}({', '.join(parts)})" if parts else type(self).__name__

    def with_template(self, source: SourceT) -> SourceT:
        """The source with this module's template, if it has none of its own."""
        if self.template is None or source.template is not None:
            return source
        return dataclasses.replace(source, template=self.template)

    def prepare_data(self) -> None:
        """Fill the hub's cache, once on each machine."""
        if self.train is not None:
            self.train.prepare("train")
        for source in {id(source): source for source in [*self.val, *self.test]}.values():
            source.prepare("test")

    def build(self, stage: str) -> None:
        if stage == "fit" and self.train is not None:
            self.train_stream = self.train.stream(self.seed)
        sources = self.test if stage in ("test", "predict") else self.val
        self.eval_sets = [source.eval_set() for source in sources]
