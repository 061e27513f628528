# SPDX-License-Identifier: Apache-2.0
"""What the framework costs: a step's time without generation, reward, forward, backward and optimizer.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda

The rest is everything that a hand-written loop would not do or would do by itself: drawing and encoding prompts, hooks,
advantages, splitting into micro-batches, statistics, logging to TensorBoard, Lightning's own loop. Measured from the
start of a step to the start of the next one.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, add_device, arguments, finish, hardware, median, spread
from benchmarks.peer.spec import Outcome, Spec
from benchmarks.workloads import addition_problems, digit_problems, random_policy, warm_started_policy, write_jsonl

PARTS = ("generation", "reward", "forward", "backward", "optimizer")
WARM = 5


class Meter:
    """Wraps functions so that their time is added up by part; a part inside another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.depth = 0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replace a method of an object by one that is timed."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return original(*args, **kwargs)
            self.depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                synchronize()
                self.seconds[part] += time.perf_counter() - start
                self.depth -= 1

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """What was added up since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def synchronize() -> None:
    """Wait for the accelerator, so that its work is counted where it was asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(spec: Spec) -> list[dict[str, float]]:
    """Seconds of every part, and of the whole, for each step."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from benchmarks.peer import ours

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    meter, steps = Meter(), []

    class Measure(ours.Stopwatch):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            meter.wrap(pl_module.sampler, "sample", "generation")
            meter.wrap(pl_module, "score", "reward")
            meter.wrap(pl_module, "micro_loss", "forward")
            meter.wrap(pl_module, "manual_backward", "backward")
            meter.wrap(pl_module, "clip_gradient", "optimizer")
            meter.wrap(trainer.optimizers[0], "step", "optimizer")
            meter.wrap(trainer.optimizers[0], "zero_grad", "optimizer")

        def close(self) -> None:
            had = len(self.outcome.steps)
            super().close()
            found = meter.take()
            if len(self.outcome.steps) > had:
                steps.append({**found, "seconds": self.outcome.steps[-1]["seconds"]})

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if spec.device == "cuda" else "cpu",
            devices=1,
            precision={"fp32": "32-true", "bf16": "bf16-true"}[spec.precision],  # type: ignore[arg-type]
            max_epochs=-1,
            log_every_n_steps=1,
            limit_val_batches=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=[Measure(spec, Outcome({}))],
        )
        trainer.fit(ours.module_of(spec), datamodule=ours.Problems(spec))
    return steps[WARM:] or steps


def spec_of(name: str, options: Any) -> Spec:
    """The quickstart, or a larger model."""
    steps = WARM + options.repeats
    common: dict[str, Any] = {"steps": steps, "device": options.device}
    if name == "quickstart":
        prompts = write_jsonl(addition_problems(16 * steps), "additions-overhead")
        return Spec(str(warm_started_policy()), str(prompts), **common)
    prompts_per_step, group, tokens = {"tiny": (2, 4, 8), "100M": (2, 4, 32), "0.5B": (16, 8, 512)}[name]
    prompts = write_jsonl(digit_problems(prompts_per_step * steps), "digits-overhead")
    return Spec(
        str(random_policy(name)), str(prompts), prompts_per_step=prompts_per_step, group_size=group, max_tokens=tokens,
        forced_length=True, reward="spread", precision="bf16" if name == "0.5B" else "fp32", **common,
    )  # fmt: skip


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__, repeats=30)
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", choices=["quickstart", "100M", "0.5B", "tiny"])
    options = parser.parse_args()
    default = ["tiny"] if options.smoke else ["0.5B"] if options.device == "cuda" else ["quickstart"]
    report = Report(
        "overhead",
        "Overhead of the framework",
        "A whole step less generation, reward, forward, backward and optimizer: prompts, hooks, advantages, "
        f"micro-batches, statistics, TensorBoard and Lightning's loop. Medians of {options.repeats} steps.",
        hardware(options.device),
        {k: v for k, v in vars(options).items() if k != "json"},
    )
    for name in options.sizes or default:
        steps = train(spec_of(name, options))
        rest = [s["seconds"] - sum(s.get(part, 0.0) for part in PARTS) for s in steps]
        shares = [100 * r / s["seconds"] for r, s in zip(rest, steps)]
        row = {part: 1000 * median([s.get(part, 0.0) for s in steps]) for part in PARTS}
        row = {"whole step": 1000 * median([s["seconds"] for s in steps]), **row}
        row |= {"overhead": 1000 * median(rest), "overhead %": median(shares)}
        report.tables.append(Table(f"{name}, milliseconds", [{**row, "range of overhead %": spread(shares)}]))
        report.goals.append(Goal(f"overhead, {name}", median(shares), "at most", 3.0, "%"))
    finish(report, options)


if __name__ == "__main__":
    main()
