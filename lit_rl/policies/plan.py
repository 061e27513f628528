# SPDX-License-Identifier: Apache-2.0
"""How much memory a run will need, from the configuration alone: nothing is loaded, nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lit_rl.policies.frozen import FrozenPolicy
from lit_rl.policies.head import tile_bytes
from lit_rl.policies.loading import LoRA, Policy, Quantization

Optimizer = Literal["adamw", "adamw8bit", "muon", "sgd"]

# Bytes of optimizer state a trainable parameter; None: that many copies in the parameter's own type.
_STATE_COPIES = {"adamw": 2, "muon": 1, "sgd": 0}
_QUANTISED_BYTES = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}  # 4 bits and a doubly quantised scale for 64 weights


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. ``activations`` is an estimate, ``kv_cache`` an upper bound, the rest is counted.

    Attributes:
        parameters: number of weights of the model (adapters included).
        trainable: how many of them are trained.
        weights: all weights.
        gradients: one number per trainable weight.
        optimizer: its state.
        kv_cache: keys and values of all rows at full length, while sampling.
        head: logit tiles and the hidden states that enter them.
        activations: what autograd keeps of one micro-batch.
        frozen: own weights of each reference and teacher, by name; there all the time.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    kv_cache: int
    head: int
    activations: int
    frozen: dict[str, int] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.optimizer + sum(self.frozen.values())

    @property
    def rollout(self) -> int:
        """Bytes while sampling."""
        return self.resident + self.kv_cache

    @property
    def update(self) -> int:
        """Bytes in the backward pass of a micro-batch."""
        return self.resident + self.gradients + self.head + self.activations

    @property
    def peak(self) -> int:
        """Bytes in the larger of the two phases."""
        return max(self.rollout, self.update)

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, f"{self.parameters:,} parameters"),
            ("gradients", self.gradients, f"{self.trainable:,} trainable"),
            ("optimizer", self.optimizer, ""),
            *((name, size, "frozen" if size else "no weights of its own here") for name, size in self.frozen.items()),
            ("kv cache", self.kv_cache, "at most, while sampling"),
            ("head", self.head, ""),
            ("activations", self.activations, "estimate"),
            ("peak, rollout", self.rollout, "all but gradients, head and activations"),
            ("peak, update", self.update, "all but the kv cache"),
        ]
        return "\n".join(f"{name:<14}{_readable(size):>11}  {note}".rstrip() for name, size, note in rows)

    def add(self, name: str, frozen: FrozenPolicy, device: str) -> None:
        """Count a reference or teacher under its name."""
        self.frozen[name] = frozen.planned_bytes(self, device)


def memory_plan(
    config: Any,
    *,
    rows: int,
    prompt_tokens: int,
    completion_tokens: int,
    micro_batch_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    trainable: LoRA | Literal["full"] = "full",
    optimizer: Optimizer = "adamw",
    quantization: Quantization = "none",
    gradient_checkpointing: bool = False,
    head_chunk: int | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """Plan the memory of one device that holds the whole policy.

    Args:
        config: the model's configuration (`Policy.config`).
        rows: completions sampled together.
        prompt_tokens: longest prompt.
        completion_tokens: longest completion.
        micro_batch_tokens: padded tokens of one backward pass.
        dtype: type of the weights, gradients and activations. Adapters are float32 over half-precision weights.
        trainable: ``"full"``, or the adapters that are trained.
        optimizer: kind of optimizer.
        quantization: of the linear layers below the adapters.
        gradient_checkpointing: keep the input of each layer only.
        head_chunk: ``chunk_tokens`` of the head.
        device: ``"cuda"`` or ``"cpu"``, whose logit tiles have different sizes.

    Returns:
        The plan; ``str(plan)`` is a table.
    """
    text = config.get_text_config()
    item = dtype.itemsize
    total, linear, added = _count(config, trainable, item)
    trained = added or {item: total}
    gradients = sum(width * count for width, count in trained.items())
    weights = _weights(total, linear, item, quantization) + sum(width * count for width, count in added.items())
    state = 2 * sum(trained.values()) if optimizer == "adamw8bit" else _STATE_COPIES[optimizer] * gradients
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_token = 2 * text.num_hidden_layers * kv_heads * head_dim * item
    tile = tile_bytes(device, micro_batch_tokens, text.vocab_size, head_chunk)
    return MemoryPlan(
        parameters=total + sum(added.values()),
        trainable=sum(trained.values()),
        weights=weights,
        gradients=gradients,
        optimizer=state,
        kv_cache=rows * (prompt_tokens + completion_tokens) * kv_token,
        head=2 * tile
        + micro_batch_tokens * text.hidden_size * (item + 4),  # a tile and its gradient; states and theirs
        activations=_activations(text, micro_batch_tokens, item, kv_heads * head_dim, gradient_checkpointing),
    )


def weight_bytes(policy: Policy) -> int:
    """Bytes of the weights of a policy as it would be loaded, from its configuration alone."""
    config = policy.config()
    item = planned_dtype(policy, config).itemsize
    total, linear, _ = _count(config, "full", item)
    return _weights(total, linear, item, policy.quantization)


def planned_dtype(policy: Policy, config: Any) -> torch.dtype:
    """The type that a policy's weights will have: its own setting, or the configuration's."""
    named = getattr(torch, policy.dtype) if policy.dtype != "auto" else getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _weights(total: int, linear: int, item: int, quantization: Quantization) -> int:
    """Bytes of ``total`` weights, ``linear`` of them in layers that are quantised."""
    saved = 0.0 if quantization == "none" else linear * (item - _QUANTISED_BYTES[quantization])
    return total * item - round(saved)


def _count(config: Any, trainable: LoRA | Literal["full"], item: int) -> tuple[int, int, dict[int, int]]:
    """Weights of the model, those in linear layers other than the head, and those that adapters add, by their bytes."""
    from transformers import AutoModelForCausalLM

    added: dict[int, int] = {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        if not isinstance(trainable, str):
            wrapped = trainable.apply(model.requires_grad_(False))
            for name, p in wrapped.named_parameters():
                if p.requires_grad:
                    # PEFT keeps adapters over half-precision weights in float32, layers trained in full in their type
                    width = item if "modules_to_save" in name else max(item, 4)
                    added[width] = added.get(width, 0) + p.numel()
    return total, linear, added


def _activations(text: Any, tokens: int, item: int, kv_width: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of ``tokens`` tokens, for attention that stores no score matrix.

    Per token and layer: the residual stream before and after each norm, in float32 too where the norm computes in it,
    queries, keys, values with and without rotation, the attention output, and four tensors of the feed-forward layer.
    Follows Korthikanti et al. (arXiv 2205.05198), with a gated feed-forward layer.
    """
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    numbers = 6 * width + 4 * kv_width + 4 * inner
    layer = numbers * item + 2 * 2 * width * 4
    outside = tokens * 4 * width * 4
    if checkpointing:
        return tokens * (text.num_hidden_layers * width * item + layer) + outside
    return tokens * text.num_hidden_layers * layer + outside


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
