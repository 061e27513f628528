# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a divergence between student and teacher over the vocabulary: in tiles, against full logits.

    python benchmarks/divergence_memory.py
    python benchmarks/divergence_memory.py --beta 0.5 --lengths 128     # the plain form of a JSD takes twice the memory
    python benchmarks/divergence_memory.py --device cuda --dtype bfloat16 --hidden 896 --teacher-hidden 3584

The plain form is what TRL's GKD trainer writes: both models' logits, `log_softmax`, `kl_div`, autograd. It is not run
at the largest size. "Recomputed" is lit-rl's own form when the weights of the tokens in the loss are not known in
advance. Every measurement is a process of its own. Memory is the peak beyond the inputs (hidden states and both heads)
and beyond the gradients that every form returns. Seconds are of the processor, so that busy neighbours do not show; of
the clock on an accelerator.
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
from benchmarks.head_memory import peak_bytes, reset_peak

MIB = 2**20
ROWS = 8


def plain_divergence(student: Any, teacher: Any, beta: float) -> Any:
    """GKD over full logits, as in TRL's ``generalized_jsd_loss``, one number a token."""
    import math

    import torch
    from torch.nn.functional import kl_div

    own, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    del student, teacher
    if beta == 0:
        return kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return kl_div(theirs, own, reduction="none", log_target=True).sum(-1)
    mixture = torch.logsumexp(torch.stack([own + math.log1p(-beta), theirs + math.log(beta)]), 0)
    from_teacher = kl_div(mixture, theirs, reduction="none", log_target=True)
    return (beta * from_teacher + (1 - beta) * kl_div(mixture, own, reduction="none", log_target=True)).sum(-1)


def measure(
    form: str,
    beta: float,
    tokens: int,
    vocab: int,
    hidden: int,
    teacher_hidden: int,
    dtype: str,
    device: str,
    repeats: int,
) -> dict[str, Any]:
    """Peak and seconds of forward and backward passes in this process."""
    import torch
    from torch import nn

    from lit_rl.objectives import Divergence
    from lit_rl.policies.divergence import vocabulary_divergence
    from lit_rl.policies.divergence_tiles import View
    from lit_rl.policies.scoring import Head

    torch.set_num_threads(1)
    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def view(width: int, count: int, words: int) -> View:
        linear = nn.Linear(width, words, bias=False)
        with torch.no_grad():
            linear.weight.normal_(std=width**-0.5, generator=generator)
        linear = linear.to(device, kind)
        states = torch.randn(count, width, generator=generator).to(device, kind)
        return View(states, Head(linear, linear.weight, None, None, 1.0, words))

    def once(student: View, teacher: View) -> float:
        weights = torch.full((len(student.hidden),), 1.0 / len(student.hidden), device=device)
        if form == "plain":
            with torch.no_grad():
                theirs = teacher.head.module(teacher.hidden)
            values = plain_divergence(student.head.module(student.hidden), theirs, beta)
        else:
            known = weights if form == "tiles" else None
            values = vocabulary_divergence(student, teacher, Divergence(beta), weights=known)
        loss = (values * weights).sum()
        loss.backward()
        student.hidden.grad = student.head.module.weight.grad = None
        return float(loss.detach())

    def pair(count: int, words: int) -> tuple[View, View]:
        student, teacher = view(hidden, count, words), view(teacher_hidden, count, words)
        student.hidden.requires_grad_()
        teacher.head.module.requires_grad_(False)
        return student, teacher

    once(*pair(8, 1024))  # libraries load and threads start at the first products: not memory of any form
    models = pair(tokens, vocab)
    held, clock = reset_peak(device), time.perf_counter if device == "cuda" else time.process_time
    seconds = []
    for _ in range(repeats):
        start = clock()
        loss = once(*models)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    returned = hidden * (tokens + vocab) * models[0].hidden.element_size()
    return {"loss": loss, "beside": peak_bytes(device) - held - returned, "seconds": median(seconds)}


def in_process_of_its_own(**settings: Any) -> dict[str, Any]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, repeats=1)
    add_device(parser)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the teacher: 0 forward KL, 1 reverse KL")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 1024], help="tokens of each of 8 rows")
    parser.add_argument("--plain-up-to", type=int, default=256, help="longest length of the plain form")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.vocab, options.hidden, options.teacher_hidden = 4096, 64, 64
        options.lengths, options.plain_up_to = [8, 16, 32], 16
    return options


def main() -> None:
    """Measure all forms and print the table."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    names = ("beta", "vocab", "hidden", "teacher_hidden", "dtype", "device", "repeats")
    settings = {name: getattr(options, name) for name in names}
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for length in options.lengths:
        tokens, found = ROWS * length, {}
        for form in ("plain", "tiles", "recomputed") if length <= options.plain_up_to else ("tiles",):
            result = found[form] = in_process_of_its_own(form=form, tokens=tokens, **settings)
            row = {"form": form, "tokens": f"{ROWS} × {length}", "MiB": result["beside"] / MIB}
            rows.append({**row, "KiB a token": result["beside"] / 1024 / tokens, "seconds": result["seconds"]})
        if "plain" in found:
            plain, ours = found["plain"], found["tiles"]
            assert abs(plain["loss"] - ours["loss"]) < 1e-3 * abs(plain["loss"]), "all forms must give the same loss"
            memory, time_ = ours["beside"] / plain["beside"], ours["seconds"] / plain["seconds"]
            at = f"of the plain form's at {ROWS} × {length}"
            goals.append(Goal(f"peak memory as a share {at}", memory, "at most", 1 / 6))
            goals.append(Goal(f"time as a multiple {at}", time_, "at most", 1.5))
    widths = f"hidden {options.hidden} and {options.teacher_hidden}"
    report = Report(
        "divergence_memory",
        "Memory of a divergence over the vocabulary",
        "The divergence of two models' next-token distributions with its gradients, in tiles, against full logits of "
        "both with autograd. Memory is beyond the inputs and the returned gradients. Seconds of one thread.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k not in ("json", "measure")},
        [Table(f"Vocabulary {options.vocab:,}, {widths}, {options.dtype}, β = {options.beta:g}", rows)],
        goals,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
