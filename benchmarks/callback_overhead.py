# SPDX-License-Identifier: Apache-2.0
"""What each intervention costs: its own time in a step of the quickstart, verification and sampling left out.

    python benchmarks/callback_overhead.py
    python benchmarks/callback_overhead.py --only RECAP GRPOLambda

Counted are the callback's hooks, the copy and comparison with which the dispatcher records what a hook changed, and the
copy of the callback's state that a step begins with. Not counted is what a callback orders from others: scoring cut
completions again (DOT), sampling a guide (NPO).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, arguments, finish, hardware
from benchmarks.workloads import random_policy, warm_started_policy

WARM = 3
LIGHTNING_HOOKS = ("on_train_batch_start", "on_train_batch_end")


def interventions() -> dict[str, Callable[[], Any]]:
    """Every callback, at settings that keep it busy."""
    from lit_rl import callbacks as c

    objectives = [
        c.Objective("accuracy", "reward/exact", "reward", "loss:policy"),
        c.Objective("length", "rollout/length_mean", target="source:addition"),
    ]
    healthy = [c.Bound("policy/entropy", low=0.0), c.Bound("policy/kl_sampler", high=1.0)]
    return {
        "DynamicOutlierTruncation": lambda: c.DynamicOutlierTruncation(alpha=1.0, min_margin=1),
        "PredictiveDynamicSampling": lambda: c.PredictiveDynamicSampling(smallest=1.0, largest=1.0, first=1.0),
        "DynamicSampling": c.DynamicSampling,
        "GRPOLambda": lambda: c.GRPOLambda(fraction=0.5),
        "RECAP": lambda: c.RECAP(objectives, window=1),
        "AutoNPO": lambda: c.AutoNPO(distances=(10, 20), max_interventions=1, reward_gain=-9.0),
        "NPOSchedule": lambda: c.NPOSchedule(0, WARM),
        "ScalarSchedule": lambda: c.ScalarSchedule("sampling.temperature", 1.0, 0.9, steps=1000),
        "RewardAlarm": c.RewardAlarm,
        "DivergenceGuard": lambda: c.DivergenceGuard(healthy, every=10),
        "EntropyMonitor": c.EntropyMonitor,
        "RolloutLogger": lambda: c.RolloutLogger(every=10),
    }


class Meter:
    """Adds up the time inside wrapped functions, less the time inside those that are excluded."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = {"count": 0, "exclude": 0}

    def count(self, owner: Any, name: str) -> None:
        """The time inside this function counts."""
        self._wrap(owner, name, "count")

    def exclude(self, owner: Any, name: str) -> None:
        """The time inside this function does not count where a counted one calls it."""
        self._wrap(owner, name, "exclude")

    def _wrap(self, owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outermost = self.depth[kind] == 0
            matters = outermost and (kind == "count" or self.depth["count"] > 0)
            self.depth[kind] += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.depth[kind] -= 1
                if matters:
                    self.seconds += (1 if kind == "count" else -1) * (time.perf_counter() - start)

        setattr(owner, name, timed)


def run(build: Callable[[], Any] | None, steps: int, smoke: bool) -> tuple[list[float], list[float]]:
    """Seconds of each whole step, and of the callback in it."""
    import torch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from lit_rl import GRPO, Policy, Sampling
    from lit_rl.datamodules import ArithmeticDataModule
    from lit_rl.hooks import HOOKS
    from lit_rl.methods import module as module_file
    from lit_rl.methods import updating as updating_file
    from lit_rl.rewards import ExactMatchReward

    meter, whole, own = Meter(), [], []
    callback = None if build is None else build()

    class Measure(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            meter.count(pl_module, "remember_boundary")
            for owner, name in ((pl_module, "rescore"), (pl_module, "score"), (pl_module.sampler, "sample")):
                meter.exclude(owner, name)
            for name in (*HOOKS, *LIGHTNING_HOOKS):
                if callback is not None and hasattr(callback, name):
                    meter.count(callback, name)

        def on_step_boundary(self, trainer: Any, module: Any) -> None:
            now = time.perf_counter()
            if hasattr(self, "began"):
                whole.append(now - self.began)
                own.append(meter.seconds)
            self.began, meter.seconds = now, 0.0

    module = GRPO(
        policy=Policy(str(random_policy("tiny") if smoke else warm_started_policy())),
        rewards=ExactMatchReward(name="exact", marker="#", require_finished=True),
        sampling=Sampling(max_tokens=8 if smoke else 128),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.0),
        max_rollouts=WARM + steps + 1,
        seed=1,
    )
    dispatchers = [(file, file.dispatch) for file in (module_file, updating_file)]
    try:
        for file, _ in dispatchers:
            meter.count(file, "dispatch")
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=-1,
                log_every_n_steps=1,
                limit_val_batches=0,
                enable_model_summary=False,
                enable_progress_bar=False,
                enable_checkpointing=False,
                logger=TensorBoardLogger(folder, name="", version=""),
                callbacks=[*([] if callback is None else [callback]), Measure()],
            )
            trainer.fit(module, datamodule=ArithmeticDataModule(digits=(2, 3), seed=1, val_size=8))
    finally:
        for file, original in dispatchers:
            file.dispatch = original  # type: ignore[attr-defined]
    return whole[WARM:], own[WARM:]


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__, repeats=20)
    parser.add_argument("--only", nargs="+", choices=sorted(interventions()), help="measure these only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = 2 if options.smoke else options.repeats
    report = Report(
        "callback_overhead",
        "Overhead of each intervention",
        "Time that a callback itself takes in a step of the quickstart: its hooks, the record of what they changed and "
        "the copy of its state. Verification and sampling that it orders are left out. Means over the steps, because "
        "some callbacks act at every tenth step only.",
        hardware(),
        {k: v for k, v in vars(options).items() if k not in ("json", "only")},
    )
    chosen = {name: build for name, build in interventions().items() if not options.only or name in options.only}
    whole, idle = run(None, steps, options.smoke)
    nothing = sum(idle) / len(idle)
    step = sum(whole) / len(whole)
    rows: list[dict[str, Any]] = []
    for name, build in chosen.items():
        _, own = run(build, steps, options.smoke)
        cost = max(0.0, sum(own) / len(own) - nothing)
        rows.append({"callback": name, "milliseconds": 1000 * cost, "% of a step": 100 * cost / step})
        report.goals.append(Goal(f"{name}, share of a step", 100 * cost / step, "at most", 2.0, "%"))
    title = f"a step without callbacks takes {1000 * step:.0f} ms"
    report.tables.append(Table(title, rows))
    finish(report, options)


if __name__ == "__main__":
    main()
