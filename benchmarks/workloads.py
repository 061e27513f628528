# SPDX-License-Identifier: Apache-2.0
"""Policies and problems that the benchmarks run on."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, WORK

# Qwen2's architecture; the last is Qwen2.5-0.5B's own shape. Weights are random: speed does not depend on them.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab": 512, "hidden": 64, "intermediate": 128, "layers": 2, "heads": 2, "kv_heads": 1},
    "0.56M": {"vocab": 64, "hidden": 128, "intermediate": 352, "layers": 3, "heads": 4, "kv_heads": 2},
    "100M": {"vocab": 32_768, "hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "kv_heads": 4},
    "0.5B": {"vocab": 151_936, "hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2},
}


def random_policy(shape: str) -> Path:
    """Folder of a policy with random weights and as many tokens as its head has rows, made at the first call."""
    import torch

    from lit_rl.policies import build_small_model, export

    folder, sizes = WORK / "policies" / shape, SHAPES[shape]
    if (folder / "config.json").exists():
        return folder
    tokenizer = padded_tokenizer(sizes["vocab"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_small_model(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            initializer_range=0.08 if sizes["hidden"] <= 256 else 0.02,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    shutil.rmtree(folder, ignore_errors=True)
    export(model, tokenizer, folder)
    return folder


def padded_tokenizer(size: int) -> Any:
    """The character tokenizer with entries that no text uses, so that all rows of a large head can be sampled."""
    from tokenizers import Tokenizer

    from lit_rl.tokenizers import build_character_tokenizer

    tokenizer = build_character_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary |= {f"filler{i}": i for i in range(len(vocabulary), size)}
    names = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token, "unk_token": tokenizer.unk_token}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), padding_side="left", **names)


def warm_started_policy() -> Path:
    """Folder of the quickstart's warm-started policy, trained at the first call (about a minute) of each recipe."""
    from benchmarks.claims.claim import WarmStart
    from benchmarks.claims.runner import warm_policy

    with chdir(ROOT):
        return warm_policy(WarmStart()).absolute()


def addition_problems(count: int, held_out: bool = False) -> list[dict[str, Any]]:
    """The quickstart's training problems in their order, or its held-out ones."""
    from lit_rl.datamodules import ArithmeticDataModule

    data = ArithmeticDataModule(digits=(2, 3), seed=1, val_size=256)
    data.setup("fit")
    records = data.validation if held_out else data.train_stream.at(0, count)
    return [{"prompt": r["prompt"], "answer": r["answer"]} for r in records[:count]]


def digit_problems(count: int, tokens: int = 32) -> list[dict[str, Any]]:
    """Prompts of random digits for a policy of `random_policy`, one token a digit."""
    rng = random.Random(0)
    return [{"prompt": "".join(rng.choices("0123456789", k=tokens)), "answer": ""} for _ in range(count)]


def write_jsonl(records: list[dict[str, Any]], name: str) -> Path:
    """Write records for both sides to read."""
    path = WORK / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def matrix_flops(folder: Path) -> tuple[float, float]:
    """Multiply-add work of a policy: FLOPs of one token's forward pass, and of its attention to one earlier token."""
    config = json.loads((folder / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)  # queries, output, keys, values
    weights = layers * (attention + 3 * hidden * config["intermediate_size"]) + config["vocab_size"] * hidden
    return 2.0 * weights, 4.0 * layers * heads * dim
