# SPDX-License-Identifier: Apache-2.0
"""A policy as it is written in a configuration, and how it becomes a model and a tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lit_rl.tokenizers import used_ids

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "fp4", "int8"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class LoRA:
    """Low-rank adapters (arXiv 2106.09685): only they are trained, and without them the model is the initial one.

    Args:
        r: rank of the update of each matrix.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with ``rslora``).
        dropout: dropout on the adapters' input; keep it at 0 for reinforcement learning, where it would make the
            trained policy another one than the sampled one.
        target_modules: names of the linear layers to adapt, or ``"all-linear"`` for all but the head.
        modules_to_save: names of layers that are trained in full beside the adapters.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        dora: train the magnitudes separately (arXiv 2402.09353).
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}; to train all weights, leave lora out.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")

    def apply(self, model: Any) -> Any:
        """Wrap ``model`` with fresh adapters (they change nothing until trained)."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes floats, too
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            modules_to_save=list(self.modules_to_save) or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )
        return get_peft_model(model, config)


@dataclass
class Policy:
    """A language model to train, in hub format.

    Args:
        path: a local folder, or an id of the Hugging Face hub. A folder that holds an exported adapter alone is its
            base model with the adapter merged.
        dtype: type of the weights; ``"auto"`` keeps the checkpoint's. Weights that are trained in pure bfloat16 lose
            updates smaller than 1/256 of themselves: prefer float32 with the Trainer's ``precision=bf16-mixed``.
        lora: train adapters instead of all weights.
        quantization: hold the frozen base weights in 4 or 8 bits (needs ``lora``, bitsandbytes and a GPU).
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` …; default: Transformers' choice.
        gradient_checkpointing: keep one activation a layer and compute the others again in the backward pass.
        trust_remote_code: run the modelling code that comes with the checkpoint. It can do anything.
        revision: branch, tag or commit of the hub repository.
        chat_template: a Jinja template, or a file that holds one, instead of the tokenizer's own.
        tokenizer: folder or hub id of the tokenizer, if it is not the model's.
    """

    path: str
    dtype: DTypeName = "auto"
    lora: LoRA | None = None
    quantization: Quantization = "none"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    chat_template: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("quantization", self.quantization, ("none", "nf4", "fp4", "int8")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if self.lora is not None:
            _require("peft", "peft", "lora")
        if self.quantization != "none":
            _require("bitsandbytes", "bitsandbytes", f"quantization={self.quantization}")

    def load(self) -> tuple[Any, Any]:
        """Model (in training mode, all that is not frozen requires gradients) and tokenizer.

        Raises:
            FileNotFoundError: if ``path`` looks like a folder and is none.
            ValueError: if the tokenizer has no end-of-sequence token or more ids than the model has embeddings.
        """
        if self.quantization != "none" and self.lora is None:
            raise ValueError(f"Weights in {self.quantization} cannot be trained: set lora, or quantization=none.")
        model, tokenizer = self.load_frozen()
        model.requires_grad_(self.lora is None)
        if self.quantization != "none":
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.lora is not None:
            model = self.lora.apply(model)
        return model.train(), tokenizer

    def load_frozen(self) -> tuple[Any, Any]:
        """Model (without adapters, in evaluation mode, nothing requires gradients) and tokenizer."""
        from transformers import AutoModelForCausalLM

        config, tokenizer = self.config(), self.tokenizer_only()
        kwargs: dict[str, Any] = {"config": config, "dtype": self.dtype} | self._hub()
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.quantization != "none":
            kwargs["quantization_config"] = quantization_config(self.quantization, self.dtype)
        path, base = local_path(self.path), base_of_adapter(self.path)
        model = AutoModelForCausalLM.from_pretrained(base or path, **kwargs)
        if base is not None:
            model = self._merge(model, path)
        check_vocabulary(model, tokenizer)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model.requires_grad_(False).eval(), tokenizer

    def config(self) -> Any:
        """The model's configuration alone."""
        from transformers import AutoConfig

        path = local_path(self.path)
        return _load(AutoConfig, base_of_adapter(self.path) or path, **self._hub())

    def tokenizer_only(self) -> Any:
        """The tokenizer, with a padding token and the chat template of this policy."""
        from transformers import AutoTokenizer

        own = self.tokenizer is None
        path = local_path(self.path if self.tokenizer is None else self.tokenizer)
        hub = self._hub() if own else {"trust_remote_code": self.trust_remote_code}
        tokenizer = _load(AutoTokenizer, path, **hub)
        if self.chat_template is not None:
            tokenizer.chat_template = _read_template(self.chat_template)
        return complete_tokenizer(tokenizer, path)

    def _merge(self, model: Any, path: str) -> Any:
        """The base model with the adapter of a folder merged into its weights."""
        from peft import PeftModel

        if self.quantization != "none":
            raise ValueError(
                f"{path} holds an adapter, which cannot be merged into weights in {self.quantization} without rounding "
                "the policy: export it with merge=True first, or set quantization=none."
            )
        merged: Any = PeftModel.from_pretrained(model, path)
        return merged.merge_and_unload()

    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def _require(module: str, extra: str, setting: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"{setting} needs the package {module}: pip install 'lit-rl[{extra}]'.")


def local_path(path: str) -> str:
    """The path with ``~`` expanded; a missing folder is told from a hub id before anything tries to download it.

    Raises:
        FileNotFoundError: if ``path`` looks like a local path and no such folder exists, or the folder holds no model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / f).exists() for f in ("config.json", "adapter_config.json", "tokenizer_config.json")):
            raise FileNotFoundError(f"The folder {path} has no config.json: it is not a model in hub format.")
        return str(folder)
    if not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"There is no folder {path}, and it is no hub id (like Qwen/Qwen3-0.6B) either.")
    return path


def base_of_adapter(path: str) -> str | None:
    """Where the base model of a folder lies that holds a LoRA adapter alone; None for any other folder or hub id.

    Raises:
        FileNotFoundError: if the base model has been moved.
    """
    folder = Path(path).expanduser()
    file = folder / "adapter_config.json"
    if not file.exists() or (folder / "config.json").exists():
        return None
    _require("peft", "peft", f"The adapter in {path}")
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        return local_path(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The folder {path} holds an adapter for {base}, which is not there: put the base model back, correct "
            "base_model_name_or_path in adapter_config.json, or export the run again with merge=True."
        ) from error


def _load(auto: Any, path: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained``; where a hub id cannot be had, the message also says that there is no such folder."""
    try:
        return auto.from_pretrained(path, **kwargs)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise OSError(f"There is no folder {path}, and loading it from the Hugging Face hub failed: {error}") from error


def complete_tokenizer(tokenizer: Any, path: str) -> Any:
    """Give the tokenizer a padding token, in place.

    Raises:
        ValueError: if it has no end-of-sequence token, without which no completion ever ends by itself.
    """
    from lightning.pytorch.utilities import rank_zero_info

    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {path} has no end-of-sequence token, so no completion could end by itself: "
            "set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        rank_zero_info(f"The tokenizer of {path} has no padding token: {tokenizer.eos_token!r} is used.")
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Every id of the tokenizer must have an embedding (more embeddings than ids are fine).

    Raises:
        ValueError: if not.
    """
    rows, used = model.get_input_embeddings().weight.shape[0], used_ids(tokenizer)
    if used > rows:
        raise ValueError(
            f"The tokenizer has ids up to {used - 1}, but the model only has {rows} embeddings: use the tokenizer that "
            "belongs to the model, or resize the embeddings (resize_token_embeddings) and save the model again."
        )


def padded_vocab(model: Any, tokenizer: Any) -> int | None:
    """Number of ids that the tokenizer can decode if the head has more rows than that, else None.

    Pass it as ``vocab_size`` to `completion_logprobs` to give the padding rows no probability. By default they count,
    as they do when sampling from the unmasked model.
    """
    used = used_ids(tokenizer)
    return used if used < model.get_input_embeddings().weight.shape[0] else None


def quantization_config(kind: Quantization, dtype: DTypeName) -> Any:
    """bitsandbytes' settings for 4-bit (arXiv 2305.14314) and 8-bit (arXiv 2208.07339) base weights."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _read_template(template: str) -> str:
    if "{" in template:
        return template
    file = Path(template).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"chat_template is neither a Jinja template nor a file: {template}.")
    return file.read_text(encoding="utf-8")


def build_small_model(
    architecture: str = "qwen2",
    *,
    vocab_size: int,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    initializer_range: float = 0.08,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    **extra: Any,
) -> nn.Module:
    """A small model with random weights, for tests, claims and the quickstart. The global seed decides the weights.

    Args:
        architecture: Transformers' model type (``qwen2``, ``qwen3``, ``llama``, ``gpt2``, ``gemma2`` …).
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream; a multiple of ``num_heads``.
        intermediate_size: width of the feed-forward layers.
        num_layers: number of layers.
        num_heads: number of attention heads.
        num_kv_heads: number of key and value heads (ignored by architectures that have none of their own).
        initializer_range: standard deviation of the initial weights; 0.02, the usual default, is too small here.
        max_position_embeddings: longest sequence in tokens.
        tie_word_embeddings: share the embedding with the head.
        eos_token_id: end-of-sequence id, also the beginning-of-sequence id that the configuration asks for.
        pad_token_id: padding id.
        extra: further entries of the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}.")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}.")
    names = {"gpt2": {"n_inner": intermediate_size}, "opt": {"ffn_dim": intermediate_size}}
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": hidden_size // num_heads,
            "initializer_range": initializer_range,
            "max_position_embeddings": max_position_embeddings,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        | names.get(architecture, {"intermediate_size": intermediate_size})
        | extra,
    )
    return AutoModelForCausalLM.from_config(config)
