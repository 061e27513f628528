# SPDX-License-Identifier: Apache-2.0
"""Memory and time of selected log-probabilities with their backward pass: lit-rl's head in tiles, against full logits.

    python benchmarks/head_memory.py
    python benchmarks/head_memory.py --device cuda --dtype bfloat16 --hidden 896

The plain form is what a training loop writes: logits in float32, `log_softmax`, `gather`, autograd. It is not run at
the largest size, where it may not fit. Every measurement is a process of its own. Memory is the peak beyond the inputs
(hidden states and weight). Both forms also return the gradient of the weight, which is as large as the weight whatever
the number of tokens; the last column leaves it out and divides by the tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, add_device, arguments, finish, hardware, median

MIB = 2**20
ROWS = 8


def peak_bytes(device: str) -> int:
    """Most memory since `reset_peak`: allocated on the accelerator, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def reset_peak(device: str) -> int:
    """Forget earlier peaks; returns what is held now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def measure(form: str, tokens: int, vocab: int, hidden: int, dtype: str, device: str, repeats: int) -> dict[str, Any]:
    """Peak of one forward and backward pass, then seconds of several, in this process."""
    import torch

    from lit_rl.policies.head import selected_logprobs

    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(device, kind).requires_grad_()
    states = torch.randn(tokens, hidden, generator=generator).to(device, kind).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    scale = torch.full((tokens,), 1.0 / tokens, device=device)

    def once() -> float:
        if form == "plain":
            logits = (states @ weight.t()).float()
            logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
            del logits
        else:
            logprobs, _ = selected_logprobs(states, weight, targets)
        loss = (logprobs * scale).sum()
        loss.backward()
        weight.grad = states.grad = None
        return float(loss)

    # Libraries load and threads start at the first products: not memory of either form.
    (states[:8].detach() @ weight[:1024].detach().t()).sum().item()
    selected_logprobs(states[:4].detach(), weight[:64].detach(), targets[:4] % 64)
    held = reset_peak(device)
    loss = once()
    peak = peak_bytes(device) - held
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    gradient = weight.numel() * weight.element_size()
    return {"loss": loss, "peak": peak, "beside": peak - gradient, "seconds": median(seconds)}


def in_process_of_its_own(**settings: Any) -> dict[str, Any]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Measure both forms and print the table."""
    parser = arguments(__doc__, repeats=5)
    add_device(parser)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 256, 512, 1024], help="tokens of each of 8 rows"
    )
    parser.add_argument("--plain-up-to", type=int, default=256, help="longest length of the plain form")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    if options.smoke:
        options.vocab, options.hidden, options.lengths, options.plain_up_to = 4096, 64, [16, 32, 64], 32
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for length in options.lengths:
        for form in ("plain", "lit-rl") if length <= options.plain_up_to else ("lit-rl",):
            result = in_process_of_its_own(
                form=form, tokens=ROWS * length, vocab=options.vocab, hidden=options.hidden, dtype=options.dtype,
                device=options.device, repeats=options.repeats,
            )  # fmt: skip
            found[form, length] = result
            row = {"form": form, "tokens": f"{ROWS} × {length}", "peak MiB": result["peak"] / MIB}
            row |= {"seconds": result["seconds"], "µs a token": 1e6 * result["seconds"] / (ROWS * length)}
            rows.append({**row, "beside the gradient, bytes a token": int(result["beside"] / (ROWS * length))})
    at = options.plain_up_to
    plain, ours = found["plain", at], found["lit-rl", at]
    assert abs(plain["loss"] - ours["loss"]) < 1e-3 * abs(plain["loss"]), "both forms must give the same loss"
    report = Report(
        "head_memory",
        "Memory of the language-model head",
        "Log-probabilities of the chosen tokens and their gradients, without ever holding all the logits: in tiles, "
        "against full float32 logits with autograd. Memory is beyond the inputs; what remains of lit-rl's is the "
        "gradient of the weight itself, which does not depend on the number of tokens. Medians of "
        f"{options.repeats} for the seconds.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k not in ("json", "measure")},
        [Table(f"Vocabulary {options.vocab:,}, hidden {options.hidden}, {options.dtype}", rows)],
    )
    memory, time_ = ours["peak"] / plain["peak"], ours["seconds"] / plain["seconds"]
    report.goals = [
        Goal(f"peak memory as a share of the plain form's at {ROWS} × {at}", memory, "at most", 1 / 8),
        Goal(f"time as a multiple of the plain form's at {ROWS} × {at}", time_, "at most", 1.2),
    ]
    finish(report, options)


if __name__ == "__main__":
    main()
