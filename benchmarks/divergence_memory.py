# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a divergence over the vocabulary: in tiles, against the plain form over full logits.

Each measurement is a process of its own, because the peak of a process never falls. Memory is the peak of the resident
set beyond the inputs (hidden states and both heads) and beyond the gradients that both forms return; time is that of
forward and backward, in CPU seconds of one thread, so that busy neighbours do not show.

    python benchmarks/divergence_memory.py                    # 8 x 128 and 8 x 256 tokens, tiles alone at 8 x 1024
    python benchmarks/divergence_memory.py --tokens 64 --vocab 4096 --hidden 64 --teacher-hidden 64
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

MIB = 2**20


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(form: str, beta: float, tokens: int, vocab: int, hidden: int, teacher_hidden: int) -> dict[str, float]:
    """One forward and backward pass in this process: peak MiB and CPU seconds."""
    import torch
    from torch import nn

    from lit_rl.objectives import Divergence
    from lit_rl.policies.divergence import vocabulary_divergence
    from lit_rl.policies.divergence_tiles import View
    from lit_rl.policies.scoring import Head

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def view(width: int) -> View:
        linear = nn.Linear(width, vocab, bias=False)
        with torch.no_grad():
            linear.weight.normal_(std=width**-0.5, generator=generator)
        states = torch.randn(tokens, width, generator=generator)
        return View(states, Head(linear, linear.weight, None, None, 1.0, vocab))

    student, teacher = view(hidden), view(teacher_hidden)
    student.hidden.requires_grad_()
    teacher.head.module.requires_grad_(False)
    weights, divergence = torch.full((tokens,), 1.0 / tokens), Divergence(beta)
    gradients = 4 * hidden * (tokens + vocab)
    before, start = peak_bytes(), time.process_time()
    if form == "plain":
        with torch.no_grad():
            theirs = teacher.head.logits(teacher.hidden)
        values = divergence.of_logits(student.head.logits(student.hidden), theirs)
    else:
        values = vocabulary_divergence(student, teacher, divergence, weights=weights if form == "tiles" else None)
    loss = (values * weights).sum()
    loss.backward()
    seconds = time.process_time() - start
    return {"seconds": seconds, "mib": (peak_bytes() - before - gradients) / MIB, "loss": float(loss)}


def in_process_of_its_own(**settings: float | str) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8 * 128, 8 * 256])
    parser.add_argument("--alone", type=int, nargs="*", default=[8 * 1024], help="tokens for tiles only")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    sizes = {"vocab": arguments.vocab, "hidden": arguments.hidden, "teacher_hidden": arguments.teacher_hidden}
    runs = [(f, b, t) for b in arguments.beta for t in arguments.tokens for f in ("plain", "tiles", "recomputed")]
    runs += [("tiles", arguments.beta[0], t) for t in arguments.alone]
    rows, plain = [], {}
    print(f"V = {arguments.vocab}, H = {arguments.hidden} and {arguments.teacher_hidden}, float32, one thread")
    print(f"{'form':<12}{'beta':>6}{'tokens':>8}{'MiB':>10}{'KiB/token':>11}{'seconds':>9}{'memory':>9}{'time':>7}")
    for form, beta, tokens in runs:
        found = in_process_of_its_own(form=form, beta=beta, tokens=tokens, **sizes)
        if form == "plain":
            plain[beta, tokens] = found
        base = plain.get((beta, tokens))
        ratio = "" if base is None else f"{found['mib'] / base['mib']:>9.3f}{found['seconds'] / base['seconds']:>7.2f}"
        row = {"form": form, "beta": beta, "tokens": tokens, **found}
        rows.append(row)
        per_token = found["mib"] * 1024 / tokens
        print(
            f"{form:<12}{beta:>6g}{tokens:>8}{found['mib']:>10.0f}{per_token:>11.0f}{found['seconds']:>9.2f}{ratio}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
