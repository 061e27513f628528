# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers and models made from configs, large enough in scale that their distributions are not flat."""

from __future__ import annotations

from typing import Any

import pytest
import torch

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +=.,>?#"
SPECIAL = ["<pad>", "<eos>", "<bos>"]


def character_tokenizer() -> Any:
    """One token a character; ids 0, 1, 2 are padding, end and beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    )


def byte_tokenizer() -> Any:
    """Byte-level, with a few merges: tokens of several characters and characters of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("<", "/"), ("</", "s")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def tiny_model(family: str, vocab_size: int = 48, **changes: Any) -> torch.nn.Module:
    """A randomly initialised causal language model of two layers, in evaluation mode."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    window = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    extra: dict[str, dict[str, Any]] = {
        "Qwen2": {},
        "Qwen3": {},
        "Llama": {},
        "Mistral": {"sliding_window": 6},
        "Gemma2": {**window, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
        "Gemma3": {**window, "query_pre_attn_scalar": 8},
        "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    }
    torch.manual_seed(0)
    if family == "GPT2":
        config: Any = hf.GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, **changes,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config).eval()
    if family == "Mamba":
        config = hf.MambaConfig(
            vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, **changes,
        )  # fmt: skip
        return hf.MambaForCausalLM(config).eval()
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(hf, name)(**{**common, **extra[family], **changes})
    return getattr(hf, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return character_tokenizer()
