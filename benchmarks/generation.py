# SPDX-License-Identifier: Apache-2.0
"""Generated tokens per second: HFSampler against the `generate` of transformers, same model, prompts and settings.

    python benchmarks/generation.py --json generation.json

Both sample at temperature 1 from the full distribution and stop at the end-of-sequence token or at the budget; only
tokens up to the end of a completion count. HFSampler also returns log-probabilities and entropies, which `generate`
does not compute. The default sizes are the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from lit_rl.policies import build_small_model
from lit_rl.rollouts import Prompts
from lit_rl.samplers import HFSampler, RolloutRequest, Sampling
from lit_rl.tokenizers import build_character_tokenizer


def hardware(device: str) -> str:
    """What the numbers were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def make_prompts(count: int, seed: int) -> Prompts:
    """Additions such as ``57+168=``, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [10 ** torch.randint(1, 4, (2,), generator=generator) - 1 for _ in range(count)]
    texts = [f"{a}+{b}=" for a, b in (pair.tolist() for pair in numbers)]
    tokenizer = build_character_tokenizer()
    return Prompts(
        ids=[torch.tensor(tokenizer(text)["input_ids"]) for text in texts],
        text=texts,
        uid=torch.arange(count),
        draw=torch.arange(count) + 1000 * seed,
        source=["additions"] * count,
    )


def by_sampler(model: Any, tokenizer: Any, args: argparse.Namespace) -> Callable[[int], int]:
    """A function that generates with HFSampler and returns the number of tokens."""
    sampler = HFSampler()
    sampler.setup(model, tokenizer)

    def run(seed: int) -> int:
        sampling = Sampling(max_tokens=args.max_tokens)
        request = RolloutRequest.for_groups(make_prompts(args.prompts, seed), args.group_size, sampling, seed)
        return int(sampler.sample(request).lengths.sum())

    return run


def by_generate(model: Any, tokenizer: Any, args: argparse.Namespace) -> Callable[[int], int]:
    """A function that generates with transformers and returns the number of tokens."""

    @torch.no_grad()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        inputs = tokenizer.pad(
            {"input_ids": [x.tolist() for x in make_prompts(args.prompts, seed).ids]}, return_tensors="pt"
        )
        inputs = inputs.to(model.device)
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.max_tokens,
            num_return_sequences=args.group_size,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int()
        return int((ended.cumsum(1) - ended == 0).sum())

    return run


def measure(runs: dict[str, Callable[[int], int]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Medians over seeds 1, 2, …, taken in turn so that a busy neighbour hits all alike; two turns do not count."""

    def timed(run: Callable[[int], int], seed: int) -> tuple[int, float]:
        start = time.perf_counter()
        tokens = run(seed)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return tokens, time.perf_counter() - start

    results: dict[str, list[tuple[int, float]]] = {name: [] for name in runs}
    for seed in (101, 102, *range(1, repeats + 1)):
        for name, run in runs.items():
            results[name].append(timed(run, seed))
    return {
        name: {
            "tokens": statistics.median(tokens for tokens, _ in found[2:]),
            "seconds": statistics.median(seconds for _, seconds in found[2:]),
            "tokens_per_second": statistics.median(tokens / seconds for tokens, seconds in found[2:]),
        }
        for name, found in results.items()
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "prompts": 16, "group-size": 8, "max-tokens": 128, "hidden": 128, "intermediate": 352, "layers": 3,
        "heads": 4, "kv-heads": 2, "vocab": 64, "repeats": 7,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()

    tokenizer = build_character_tokenizer()
    torch.manual_seed(0)
    model: Any = build_small_model(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        initializer_range=0.08 if args.hidden <= 256 else 0.02,
        max_position_embeddings=args.max_tokens + 64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{hardware(args.device)}; torch {torch.__version__}; Qwen2, {parameters / 1e6:.2f}M parameters, {args.dtype}"
    )
    print(f"{args.prompts} prompts × {args.group_size} completions, at most {args.max_tokens} tokens; ", end="")
    print(f"medians of {args.repeats}\n")
    runs = {"HFSampler": by_sampler(model, tokenizer, args), "generate": by_generate(model, tokenizer, args)}
    rows = measure(runs, args.repeats, args.device)
    print(f"{'':<12}{'tokens':>9}{'seconds':>9}{'tokens/s':>11}")
    for name, row in rows.items():
        print(f"{name:<12}{row['tokens']:>9.0f}{row['seconds']:>9.3f}{row['tokens_per_second']:>11,.0f}")
    ratio = rows["HFSampler"]["tokens_per_second"] / rows["generate"]["tokens_per_second"]
    print(f"\nHFSampler is {ratio:.2f} times as fast.")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        report = {"hardware": hardware(args.device), "settings": settings, "results": rows, "ratio": ratio}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
