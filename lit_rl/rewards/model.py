# SPDX-License-Identifier: Apache-2.0
"""Learned reward models: a sequence-classification model with one output, in Hugging Face format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rl.rewards.base import Reward, RewardInput, RewardSetupError


class RewardModelReward(Reward):
    """The scalar output of a reward model on prompt and completion.

    The model is loaded when it is first needed. It is no submodule of the training module, so optimizer, checkpoints
    and wrappers never see it.

    Args:
        path: folder or hub name of a model that `AutoModelForSequenceClassification` loads, with its tokenizer.
        revision: branch, tag or commit of a hub model.
        dtype: name of the floating-point type of the weights, such as ``bfloat16``; ``auto`` takes the stored one.
        device: where it runs; by default the first accelerator, else the CPU.
        batch_size: completions in one forward pass.
        max_length: longest input in tokens; longer ones lose their beginning.
        messages_column: dataset column with the prompt as chat messages (or as the text of the user's message). The
            conversation is then written with the reward model's own chat template. By default the policy's prompt text
            and the completion are put one after the other.
        name: see `Reward`.
        weight: see `Reward`.
        sources: see `Reward`.

    Raises:
        ValueError: ``batch_size`` or ``max_length`` is not positive, or ``dtype`` is not a floating-point type.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        messages_column: str | None = None,
        name: str = "reward_model",
        weight: float = 1.0,
        sources: list[str] | None = None,
    ) -> None:
        super().__init__(name, weight, sources=sources)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}.")
        torch_type = getattr(torch, dtype, None)
        if dtype != "auto" and not (isinstance(torch_type, torch.dtype) and torch_type.is_floating_point):
            raise ValueError(f"dtype must be 'auto' or a floating-point type such as 'bfloat16', got {dtype!r}.")
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.max_length = max_length
        self.messages_column = messages_column
        self.requires_columns = () if messages_column is None else (messages_column,)
        self._model: Any = None
        self._tokenizer: Any = None

    def score(self, batch: RewardInput) -> Tensor:
        model, tokenizer = self._load()
        encoded = [self._encode(text, tokenizer) for text in self._texts(batch, tokenizer)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding
        values = torch.empty(len(encoded))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits = model(**inputs).logits  # [n, 1]
            values[rows] = logits[:, 0].float().cpu()
        return values

    def self_test(self) -> None:
        """Load the model, so that a wrong path is found before training."""
        self._load()

    def close(self) -> None:
        self._model = self._tokenizer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_tokenizer": None}

    def _texts(self, batch: RewardInput, tokenizer: Any) -> list[str]:
        if self.messages_column is None:
            return [prompt + completion for prompt, completion in zip(batch.prompts, batch.completions)]
        texts = []
        for prompt, completion in zip(batch.columns[self.messages_column], batch.completions):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            messages.append({"role": "assistant", "content": completion})
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        return texts

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        # A chat template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=self.messages_column is None)["input_ids"]
        return ids if self.max_length is None else ids[-self.max_length :]

    def _load(self) -> tuple[Any, Any]:
        if self._model is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(self.path, revision=self.revision)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                self.path, revision=self.revision, dtype=self.dtype
            )
            self._check(model, tokenizer)
            tokenizer.padding_side = "right"
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id  # the model finds the last token by it
            model.requires_grad_(False)
            self._model = model.eval().to(self.device or _default_device())
            self._tokenizer = tokenizer
        return self._model, self._tokenizer

    def _check(self, model: Any, tokenizer: Any) -> None:
        if model.config.num_labels != 1:
            raise RewardSetupError(
                f"The reward model {self.path!r} has {model.config.num_labels} outputs; a reward model has one "
                "(num_labels=1). Use a FunctionReward to turn several outputs into a number."
            )
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if padding is None or padding >= model.get_input_embeddings().num_embeddings:
            raise RewardSetupError(
                f"The tokenizer of {self.path!r} has no padding or end token that the model knows; give it one."
            )
        if self.messages_column is not None and not tokenizer.chat_template:
            raise RewardSetupError(
                f"The tokenizer of {self.path!r} has no chat template; leave out messages_column to score plain text."
            )


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else str(accelerator)
