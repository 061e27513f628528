# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, one of each family that differs in attention or head."""

from typing import Any

import torch

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 4},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
}
VOCAB = 50


def tiny(family: str, attn: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A two-layer model with weights large enough that its distributions are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.3}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family != "gpt2":
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype).eval()
