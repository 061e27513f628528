# SPDX-License-Identifier: Apache-2.0
"""Validation, test and prediction: own prompts, own sampling settings, the same rewards."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lit_rl.distributed import union_of_names
from lit_rl.hooks import callbacks_with
from lit_rl.methods.reporting import PROGRESS_BAR, Ledger
from lit_rl.metrics.generation import GenerationMetrics
from lit_rl.predictions import prediction_rows
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Interrupt, RolloutRequest
from lit_rl.seeding import mix_seeds, single_precision

if TYPE_CHECKING:
    from lit_rl.data import EvalSet
    from lit_rl.methods.module import RLModule


class Evaluation:
    """Everything of an `RLModule` that does not train.

    Logged are ``val/<metric>`` (the mean over the evaluation sets), with several sets ``val/<set>/<metric>``, and for
    each source of a set that mixes several ``val/<source>/<metric>`` (or ``val/<set>/<source>/<metric>``).
    """

    metrics: dict[tuple[int, str], GenerationMetrics]  # by index of the set, and source ("": all of them)
    evaluation: dict[str, float]  # what the last evaluation logged

    def on_validation_start(self: RLModule) -> None:
        self.begin_evaluation()

    def on_test_start(self: RLModule) -> None:
        self.begin_evaluation()

    def on_predict_start(self: RLModule) -> None:
        self.begin_evaluation()

    def begin_evaluation(self: RLModule) -> None:
        """Fresh metrics, and whole weights until the end."""
        self.prepare_run()
        self.metrics = {}
        self._whole_weights = ExitStack()
        self._whole_weights.enter_context(self.placement.gathered(self))

    def on_validation_end(self: RLModule) -> None:
        self._whole_weights.close()

    def on_test_end(self: RLModule) -> None:
        self._whole_weights.close()

    def on_predict_end(self: RLModule) -> None:
        self._whole_weights.close()

    def validation_step(self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch, dataloader_idx)

    def test_step(self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch, dataloader_idx)

    @single_precision()
    def predict_step(
        self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """One dictionary a completion, see `prediction_rows`. `lit-rl predict` writes them to jsonl."""
        rollouts = self.generate(batch, self.data.eval_sets[dataloader_idx])
        return prediction_rows(rollouts, self.tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True))

    @single_precision()
    def measure(self: RLModule, batch: dict[str, Any], index: int) -> None:
        """Sample and score one batch of an evaluation set, and add it to the metrics of the set and of its sources."""
        rollouts = self.generate(batch, self.data.eval_sets[index])
        verifier = next((r for r in self.rewards if r.verifier), None)
        answers = None if verifier is None else verifier.answers(self.reward_input(rollouts))
        self.metric(index).update(rollouts, answers)
        source_of_row = [rollouts.prompts.source[g] for g in rollouts.group.tolist()]
        for source in dict.fromkeys(source_of_row):
            rows = [i for i, s in enumerate(source_of_row) if s == source]
            part = rollouts.select(torch.tensor(rows, device=rollouts.device))
            self.metric(index, source).update(part, _at(answers, rows))
        for callback in callbacks_with(self.trainer, "on_evaluation_batch"):
            callback.on_evaluation_batch(self.trainer, self, rollouts)

    def metric(self: RLModule, index: int, source: str = "") -> GenerationMetrics:
        """The metrics of an evaluation set, or of one source in it."""
        if (index, source) not in self.metrics:
            fresh = GenerationMetrics(self.data.eval_sets[index].samples)
            self.metrics[index, source] = fresh.to(self.device)
        return self.metrics[index, source]

    def generate(self: RLModule, batch: dict[str, Any], eval_set: EvalSet) -> Rollouts:
        """Completions for one batch of an evaluation set, scored."""
        settings: dict[str, Any] = {name: getattr(eval_set, name) for name in ("temperature", "top_p", "max_tokens")}
        sampling = dataclasses.replace(self.sampling, **{k: v for k, v in settings.items() if v is not None})
        prompts = self.encode(batch["records"], batch["draws"])
        seed = mix_seeds(self.seed, "evaluation", eval_set.name)
        request = RolloutRequest.for_groups(prompts, eval_set.samples, sampling, seed, entropy=False)
        request.should_stop = Interrupt(self.stop_requested)
        with self.sampler.active():
            rollouts = self.sampler.sample(request).to(self.device)
        return self.score(rollouts)

    def on_validation_epoch_end(self: RLModule) -> None:
        self.report_evaluation("val")

    def on_test_epoch_end(self: RLModule) -> None:
        self.report_evaluation("test")

    def report_evaluation(self: RLModule, prefix: str) -> None:
        """Log what was measured, the same numbers on every rank."""
        numbers = self.evaluation_numbers(prefix)
        for callback in callbacks_with(self.trainer, "on_evaluation_metrics"):
            callback.on_evaluation_metrics(self.trainer, self, numbers, prefix)
        if self.agree_to_stop():  # completions were cut short: no number is better than a wrong one
            unknown = {k: math.nan for k in numbers if k not in self.trainer.callback_metrics}
            self.log_dict(unknown, logger=False)  # or callbacks that monitor them would complain
            self.validation_is_due = not self.interrupted  # that of an undone step was not
            return
        numbers |= self.evaluation_failures(prefix)
        self.evaluation = numbers
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.show_numbers(numbers, PROGRESS_BAR)
            self.write_numbers(numbers)  # at the clock of the step that it follows
            return
        # Lightning prints and returns what is logged. All ranks have the same numbers already; it would warn otherwise.
        self.log_dict({k: v for k, v in numbers.items() if k == f"{prefix}/pass@1"}, prog_bar=True, sync_dist=True)
        self.log_dict({k: v for k, v in numbers.items() if k != f"{prefix}/pass@1"}, sync_dist=True)

    def evaluation_failures(self: RLModule, prefix: str) -> dict[str, float]:
        """Rows that rewards failed on, over all ranks; they do not count as failures of training."""
        ledger = Ledger()
        for reward in self.rewards:
            for kind, count in reward.pop_failures().items():
                ledger.total(f"{prefix}/{reward.name}_{kind}", float(count))
        return ledger.reduce(self.device)

    def evaluation_numbers(self: RLModule, prefix: str) -> dict[str, float]:
        """Everything that the metrics know, over all ranks: log name -> value."""
        sets = self.data.eval_sets
        # A rank may not have met every source, but all must take part in every reduction, in the same order.
        names = [n.split("|", 1) for n in sorted(union_of_names(f"{i}|{source}" for i, source in self.metrics))]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # a rank may have nothing to add
            results = {(int(i), s): self.metric(int(i), s).compute() for i, s in names}
        numbers: dict[str, float] = {}
        wholes = [results[i, ""] for i in range(len(sets)) if (i, "") in results]
        for name in dict.fromkeys(k for r in wholes for k in r):
            numbers[f"{prefix}/{name}"] = float(torch.stack([r[name] for r in wholes if name in r]).nanmean())
        for (i, source), result in results.items():
            label = [sets[i].name] if len(sets) > 1 else []
            mixed = sum(1 for j, s in results if j == i and s) > 1
            if source and not mixed:
                continue
            label += [source] if source else []
            if label:
                numbers |= {"/".join([prefix, *label, k]): float(v) for k, v in result.items()}
        return numbers


def _at(answers: Sequence[Hashable | None] | None, rows: list[int]) -> list[Hashable | None] | None:
    return None if answers is None else [answers[i] for i in rows]
