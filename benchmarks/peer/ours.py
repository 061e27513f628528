# SPDX-License-Identifier: Apache-2.0
"""lit-rl's side of a comparison: ``python benchmarks/peer/ours.py SPEC.json OUTCOME.json``."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

import lit_rl
from benchmarks.peer.spec import Clock, Outcome, Spec, from_arguments, spread_reward
from lit_rl import GRPO, Policy, RLModule, Sampling
from lit_rl.data import EvalSet, ListStream, PromptDataModule
from lit_rl.rewards import ExactMatchReward, FunctionReward, Reward, RewardInput
from lit_rl.samplers import HFSampler, RolloutSampler
from lit_rl.samplers.stopping import Stopping
from lit_rl.schedules import WarmupLinear

STAGES = ("rollout", "reward", "recall", "update", "sync")


class EndlessSampler(HFSampler):
    """Goes on after the end-of-sequence token, so that every completion uses its whole budget."""

    def _stopping_for(self, sampling: Sampling) -> Stopping:
        stopping = super()._stopping_for(sampling)
        stopping.ends, stopping.is_end = torch.zeros_like(stopping.ends), torch.zeros_like(stopping.is_end)
        return stopping


class Problems(PromptDataModule):
    """Training and held-out problems in the order of their files."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(eval_batch_size=256)
        self.spec = spec

    def build(self, stage: str) -> None:
        self.train_stream = ListStream(self.spec.records(self.spec.prompts), shuffle=False)
        if self.spec.validation:
            held_out = ListStream(self.spec.records(self.spec.validation), shuffle=False)
            self.eval_sets = [EvalSet("held-out", held_out, samples=self.spec.samples)]


class Stopwatch(Callback):
    """Seconds from the start of a step to the start of the next, logging included, validation not."""

    def __init__(self, spec: Spec, outcome: Outcome) -> None:
        self.spec, self.outcome = spec, outcome
        self.clock = Clock()
        self.began: float | None = None
        self.processor = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.clock = Clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.close()
        self.began, self.processor = self.clock.seconds(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.close()

    def close(self) -> None:
        """Note the step that is over now."""
        if self.began is None:
            return
        now, metrics = self.clock.seconds(), self.metrics
        step = {stage: metrics[f"time/{stage}"] for stage in STAGES if f"time/{stage}" in metrics}
        step |= {"seconds": now - self.began, "at": now, "tokens": metrics["rollout/tokens"]}
        step["processor"] = time.process_time() - self.processor
        step["reward_mean"] = metrics["reward/mean"]
        step |= {name: value for name, value in metrics.items() if name.startswith("sampler/")}
        self.outcome.steps.append(step)
        self.began = None

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.close()
        self.pause = self.clock.paused()
        self.pause.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.pause.__exit__(None, None, None)
        rate = float(trainer.callback_metrics["val/pass@1"])
        at = self.clock.seconds() if self.outcome.steps else 0.0
        self.outcome.evaluations.append({"step": len(self.outcome.steps), "at": at, "pass@1": rate})
        if self.spec.stop_at is not None and rate >= self.spec.stop_at:
            trainer.should_stop = True


def reward_of(spec: Spec) -> Reward:
    """The reward that the spec names."""
    if spec.reward == "exact":
        return ExactMatchReward(marker="#", require_finished=True)

    def spread(batch: RewardInput) -> list[float]:
        return [spread_reward(ids, 2**20) for ids in batch.completion_ids]

    return FunctionReward(spread, name="spread")


def module_of(spec: Spec, sampler: RolloutSampler | None = None) -> RLModule:
    """The method with the spec's settings (and another sampler), everything else as it is by default."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[spec.precision]
    fused = spec.device == "cuda" or spec.precision == "fp32"
    optimizer = functools.partial(
        torch.optim.AdamW, lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
    )
    return GRPO(
        Policy(spec.policy, dtype=dtype),  # type: ignore[arg-type]
        rewards=[reward_of(spec)],
        sampler=sampler or (EndlessSampler() if spec.forced_length else HFSampler()),
        sampling=Sampling(max_tokens=spec.max_tokens),
        optimizer=optimizer,
        scheduler=functools.partial(WarmupLinear, warmup=spec.warmup),
        prompts_per_step=spec.prompts_per_step,
        group_size=spec.group_size,
        max_rollouts=spec.steps,
        seed=spec.seed,
    )


def run(spec: Spec, sampler: RolloutSampler | None = None, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train, and measure every step; with another sampler and more callbacks if given."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    outcome = Outcome({"lit-rl": lit_rl.__version__, "torch": torch.__version__})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if spec.device == "cuda" else "cpu",
            devices=1,
            precision={"fp32": "32-true", "bf16": "bf16-true"}[spec.precision],  # type: ignore[arg-type]
            max_epochs=-1,
            log_every_n_steps=1,
            check_val_every_n_epoch=None,
            val_check_interval=spec.evaluate_every,
            limit_val_batches=1.0 if spec.validation else 0,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=[Stopwatch(spec, outcome), *callbacks],
        )
        module, data = module_of(spec, sampler), Problems(spec)
        if spec.validation:
            trainer.validate(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data)
    return outcome


if __name__ == "__main__":
    spec, target = from_arguments()
    run(spec).save(target)
