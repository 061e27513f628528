# SPDX-License-Identifier: Apache-2.0
"""Validation, test and prediction: own prompts, own sampling settings, the same rewards."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from lit_rl.metrics.generation import GenerationMetrics
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutRequest
from lit_rl.seeding import mix_seeds
from lit_rl.storage import readable_rows

if TYPE_CHECKING:
    from lit_rl.data import EvalSet
    from lit_rl.methods.module import RLModule


class Evaluation:
    """Everything of an `RLModule` that does not train."""

    def on_validation_start(self: RLModule) -> None:
        self.begin_evaluation()

    def on_test_start(self: RLModule) -> None:
        self.begin_evaluation()

    def on_predict_start(self: RLModule) -> None:
        self.begin_evaluation()

    def begin_evaluation(self: RLModule) -> None:
        """Fresh metrics, one for each evaluation set."""
        self.prepare_run()
        majority = any(hasattr(r, "answers") for r in self.rewards if r.verifier)
        self.metrics = [GenerationMetrics(s.samples, majority).to(self.device) for s in self.data.eval_sets]

    def validation_step(self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch, dataloader_idx)

    def test_step(self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measure(batch, dataloader_idx)

    def predict_step(
        self: RLModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """One dictionary a completion: prompt, completion, scores. `lit-rl predict` writes them to jsonl."""
        rollouts = self.generate(batch, self.data.eval_sets[dataloader_idx])
        return readable_rows(rollouts, self.tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True))

    def measure(self: RLModule, batch: dict[str, Any], index: int) -> None:
        """Sample and score one batch of an evaluation set and add it to the set's metrics."""
        rollouts = self.generate(batch, self.data.eval_sets[index])
        verifier: Any = next((r for r in self.rewards if r.verifier), None)
        answers = verifier.answers(self.reward_input(rollouts)) if hasattr(verifier, "answers") else None
        self.metrics[index].update(rollouts, answers)

    def generate(self: RLModule, batch: dict[str, Any], eval_set: EvalSet) -> Rollouts:
        """Completions for one batch of an evaluation set, scored."""
        settings: dict[str, Any] = {name: getattr(eval_set, name) for name in ("temperature", "top_p", "max_tokens")}
        sampling = dataclasses.replace(self.sampling, **{k: v for k, v in settings.items() if v is not None})
        prompts = self.encode(batch["records"], batch["draws"])
        seed = mix_seeds(self.seed, "evaluation", eval_set.name)
        request = RolloutRequest.for_groups(prompts, eval_set.samples, sampling, seed, entropy=False)
        request.should_stop = lambda progress: self.stop_requested()
        with self.sampler.active():
            rollouts = self.sampler.sample(request).to(self.device)
        return self.score(rollouts)

    def on_validation_epoch_end(self: RLModule) -> None:
        self.report_evaluation("val")

    def on_test_epoch_end(self: RLModule) -> None:
        self.report_evaluation("test")

    def report_evaluation(self: RLModule, prefix: str) -> None:
        """Log each set under its name where there are several, and the mean over sets."""
        if self.agree_to_stop():
            return  # completions were cut short: no number is better than a wrong one
        results = [m.compute() for m in self.metrics]
        sets = self.data.eval_sets
        numbers: dict[str, torch.Tensor] = {}
        if len(sets) > 1:
            for eval_set, result in zip(sets, results):
                numbers |= {f"{prefix}/{eval_set.name}/{k}": v for k, v in result.items()}
        for name in dict.fromkeys(k for r in results for k in r):
            values = torch.stack([r[name] for r in results if name in r])
            numbers[f"{prefix}/{name}"] = values.nanmean()
        self.evaluation = {k: float(v) for k, v in numbers.items()}
        main = {k: v for k, v in numbers.items() if k == f"{prefix}/pass@1"}
        self.log_dict(main, prog_bar=True, rank_zero_only=False)
        self.log_dict({k: v for k, v in numbers.items() if k not in main})
