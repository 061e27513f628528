# SPDX-License-Identifier: Apache-2.0
"""A complete run that takes seconds on a CPU: a tiny policy, a toy task that it can learn, a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_rl.checkpoint import DurableCheckpointIO, RolloutCheckpoint
from lit_rl.data import EvalSet, GeneratedStream, PromptDataModule
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.module import RLModule
from lit_rl.policies import Policy, build_small_model, export
from lit_rl.rewards import FunctionReward, Reward, RewardInput
from lit_rl.samplers.base import Sampling
from lit_rl.tokenizers import build_character_tokenizer

CHARACTERS = "0123456789+="


def make_policy(folder: Path | str, architecture: str = "qwen2", seed: int = 0, **sizes: Any) -> Path:
    """Write a randomly initialised policy of about 20,000 parameters in hub format.

    Args:
        folder: where to; an existing policy there is kept.
        architecture: a model type that `lit_rl.policies.build_small_model` knows.
        seed: seed of the weights.
        sizes: overrides of the model's sizes.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    tokenizer = build_character_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_small_model(
            architecture,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sizes,
        )
    export(model, tokenizer, folder)
    return folder


def toy_record(rng: Any) -> dict[str, Any]:
    """A prompt such as ``"7+2="`` whose answer is its first digit."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"prompt": f"{a}+{b}=", "answer": str(a)}


class ToyData(PromptDataModule):
    """Endless toy prompts, and a few held-out ones.

    Args:
        seed: seed of the prompts.
        evaluation: held-out prompts.
    """

    def __init__(self, seed: int = 0, evaluation: int = 8) -> None:
        super().__init__()
        self.seed, self.evaluation = seed, evaluation

    def build(self, stage: str) -> None:
        self.train_stream = GeneratedStream(toy_record, seed=self.seed, source="toy")
        held_out = GeneratedStream(toy_record, seed=self.seed + 1, source="toy")
        self.eval_sets = [EvalSet("toy", held_out, limit=self.evaluation)]


def starts_with_digit(batch: RewardInput) -> list[float]:
    """1 if the completion starts with a digit: a random policy is right now and then, and learns it in a few steps."""
    return [float(text[:1].isdigit()) for text in batch.completions]


def toy_reward(**options: Any) -> Reward:
    """The toy task's verifier."""
    return FunctionReward(starts_with_digit, name="digit", verifier=True, **options)


def make_module(policy: Path | str, method: type[RLModule] = GRPO, **options: Any) -> RLModule:
    """A method on the toy task; any argument can be overridden.

    Args:
        policy: folder of the policy, see `make_policy`.
        method: class of the method.
        options: arguments of the method.
    """
    defaults: dict[str, Any] = {
        "policy": Policy(str(policy)),
        "rewards": [toy_reward()],
        "sampling": Sampling(max_tokens=6),
        "optimizer": adamw,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_rollouts": 6,
        "seed": 3,
    }
    return method(**{**defaults, **options})


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that learns the toy task in a few steps."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def make_trainer(folder: Path | str, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A quiet CPU trainer whose files go to ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "default_root_dir": str(folder),
        "plugins": [DurableCheckpointIO()],
    }
    checkpoint = [] if any(isinstance(c, RolloutCheckpoint) for c in callbacks) else [RolloutCheckpoint()]
    return Trainer(**{**defaults, **options}, callbacks=[*callbacks, *checkpoint])


def train(
    folder: Path | str,
    module: RLModule,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | str | None = None,
    data: PromptDataModule | None = None,
    **options: Any,
) -> Trainer:
    """Fit a module on the toy task and return the trainer."""
    trainer = make_trainer(folder, callbacks, **options)
    trainer.fit(module, datamodule=data or ToyData(), ckpt_path=checkpoint, weights_only=True)
    return trainer


def final_state(module: RLModule) -> dict[str, torch.Tensor]:
    """The weights of a trained module, cloned."""
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


CallbackFactory = Callable[[], Sequence[Callback]]
