# SPDX-License-Identifier: Apache-2.0
"""TRL's side of a comparison, in TRL's own environment: ``python benchmarks/peer/trl_side.py SPEC.json OUTCOME.json``.

TRL is run at the setting that was the fastest of those tried on CPUs: no gradient checkpointing, the whole batch in one
pass, prompts and completions padded to the longest and not to a multiple, no KL term, nothing reported or saved.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peer.spec import Clock, Outcome, Spec, exact, from_arguments, spread_reward


class MeasuredTrainer(GRPOTrainer):
    """Notes how long generation and the loss take, and how much was generated."""

    stages: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = super()._generate_single_turn(*args, **kwargs)
        self.add("rollout", time.perf_counter() - start)
        self.add("tokens", float(sum(len(ids) for ids in out[0])))
        return out

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), self.stages.get("rollout", 0.0)
        out = super().training_step(*args, **kwargs)
        self.add("update", time.perf_counter() - start - (self.stages.get("rollout", 0.0) - before))
        return out


class Stopwatch(TrainerCallback):
    """Seconds from the end of a step to the end of the next, evaluation not counted."""

    def __init__(self, spec: Spec, outcome: Outcome, tokenizer: Any) -> None:
        self.spec, self.outcome, self.tokenizer = spec, outcome, tokenizer
        self.trainer: MeasuredTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.spec.validation:
            self.evaluate(kwargs["model"], 0.0)
        self.clock, self.last = Clock(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.clock.seconds()
        assert self.trainer is not None
        step = {**self.trainer.stages, "seconds": now - self.last, "at": now}
        self.trainer.stages = {}
        self.outcome.steps.append(step)
        if self.spec.validation and len(self.outcome.steps) % self.spec.evaluate_every == 0:
            with self.clock.paused():
                rate = self.evaluate(kwargs["model"], now)
            if self.spec.stop_at is not None and rate >= self.spec.stop_at:
                control.should_training_stop = True
        self.last = self.clock.seconds()

    @torch.no_grad()
    def evaluate(self, model: Any, at: float) -> float:
        """Held-out pass@1, sampled as in training."""
        assert self.spec.validation
        records = [r for r in self.spec.records(self.spec.validation) for _ in range(self.spec.samples)]
        was_training = model.training
        model.eval()
        correct = 0.0
        for first in range(0, len(records), 512):
            part = records[first : first + 512]
            prompts = [r["prompt"] for r in part]
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            inputs.pop("token_type_ids", None)
            ids = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.spec.max_tokens,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
            )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
            ended = (ids == self.tokenizer.eos_token_id).any(1).tolist()
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            correct += sum(exact(t, r["answer"]) for t, r, e in zip(texts, part, ended) if e)
        model.train(was_training)
        rate = correct / len(records)
        self.outcome.evaluations.append({"step": len(self.outcome.steps), "at": at, "pass@1": rate})
        return rate


def reward_of(spec: Spec, tokenizer: Any) -> Any:
    """The reward that the spec names, in TRL's form."""

    def exact_reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> Any:
        ended = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        return [exact(text, gold) if end else 0.0 for text, gold, end in zip(completions, answer, ended)]

    def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [spread_reward(ids, 2**20) for ids in completion_ids]

    return exact_reward if spec.reward == "exact" else spread


def config_of(spec: Spec, folder: str, end: int) -> GRPOConfig:
    """TRL's arguments for the spec."""
    rows = spec.prompts_per_step * spec.group_size
    batch = min(spec.batch, rows)
    return GRPOConfig(
        output_dir=folder,
        max_steps=spec.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
        num_generations=spec.group_size,
        max_completion_length=spec.max_tokens,
        generation_kwargs={"suppress_tokens": [end]} if spec.forced_length else None,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        num_iterations=1,
        learning_rate=spec.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant_with_warmup" if spec.warmup else "constant",
        warmup_steps=spec.warmup,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=spec.device == "cpu",
        seed=spec.seed,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def run(spec: Spec) -> Outcome:
    """Train, and measure every step."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcome = Outcome({"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__})
    tokenizer = AutoTokenizer.from_pretrained(spec.policy)
    model = AutoModelForCausalLM.from_pretrained(
        spec.policy, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[spec.precision]
    )
    stopwatch = Stopwatch(spec, outcome, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            model=model,
            reward_funcs=[reward_of(spec, tokenizer)],
            args=config_of(spec, folder, tokenizer.eos_token_id),
            train_dataset=Dataset.from_list([dict(r) for r in spec.records(spec.prompts)]),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        stopwatch.trainer = trainer
        trainer.train()
    return outcome


if __name__ == "__main__":
    spec, target = from_arguments()
    run(spec).save(target)
