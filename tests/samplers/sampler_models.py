# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers and models made from configs, large enough in scale that their distributions are not flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.rollouts import Prompts, Rollouts
from lit_rl.samplers import HFSampler, RolloutRequest, Sampling

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
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        config: Any = hf.GPT2Config(**{"vocab_size": vocab_size, **sizes, **ids, **changes})
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


def prompts(*ids: list[int], draw: int = 0) -> Prompts:
    """Prompts of the given token ids, drawn one after the other from ``draw`` on."""
    return Prompts(
        ids=[torch.tensor(x, dtype=torch.long) for x in ids],
        text=[""] * len(ids),
        uid=torch.arange(len(ids)),
        draw=draw + torch.arange(len(ids)),
        source=["test"] * len(ids),
    )


THREE = ([5, 9, 11, 4, 30], [7, 8], [12, 20, 21, 22, 23, 24, 25, 13])


def request(group_size: int = 3, seed: int = 0, texts: Sequence[list[int]] = THREE, **changes: Any) -> RolloutRequest:
    """Completions of three prompts; ``changes`` are of the request or of its sampling settings."""
    names = vars(Sampling())
    sampling = Sampling(**{"max_tokens": 12} | {k: v for k, v in changes.items() if k in names})
    rest = {k: v for k, v in changes.items() if k not in names}
    return RolloutRequest.for_groups(prompts(*texts), group_size, sampling, seed, **rest)


def connected(model: Any, tokenizer: Any = None, **settings: Any) -> HFSampler:
    """An `HFSampler` that is set up."""
    sampler = HFSampler(**settings)
    sampler.setup(model, tokenizer or character_tokenizer())
    return sampler


@torch.no_grad()
def full_logits(model: Any, rollouts: Rollouts) -> list[Tensor]:
    """For each row ``[length, V]``: the logits behind its tokens, by one plain forward over the whole row."""
    out = []
    for group, ids in zip(rollouts.group.tolist(), rollouts.completions(), strict=True):
        prompt = rollouts.prompts.ids[group]
        sequence = torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])
        logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
        out.append(logits[len(prompt) - 1 : len(sequence) - 1])
    return out


def largest_gap(model: Any, rollouts: Rollouts) -> float:
    """Largest difference, in nats, between the sampler's log-probabilities and a plain forward's at temperature 1."""
    gaps = [0.0]
    for row, logits in enumerate(full_logits(model, rollouts)):
        own = logits.log_softmax(-1).gather(1, rollouts.completion_ids[row, : len(logits), None])[:, 0]
        gaps += (own - rollouts.logprobs["sampler"][row, : len(logits)]).abs().tolist()
    return max(gaps)
