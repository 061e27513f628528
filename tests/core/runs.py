# SPDX-License-Identifier: Apache-2.0
"""Small complete runs that tests repeat, interrupt and resume, in this process or in others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rl.checkpoint import RolloutCheckpoint
from lit_rl.distributed import all_sum, world_size
from lit_rl.hooks import RolloutCallback
from lit_rl.methods import RLModule
from lit_rl.policies import FrozenCopy
from lit_rl.schedules import WarmupLinear
from lit_rl.testing import make_module, train

UNREPEATABLE = ("time/", "speed/", "memory/")  # of all that is logged, what a second run measures differently


def schedule(optimizer: torch.optim.Optimizer) -> WarmupLinear:
    return WarmupLinear(optimizer, warmup=3, total=40)


def full_module(policy: Path, max_rollouts: int = 12, **options: Any) -> RLModule:
    """Everything at once that a resumed run could forget."""
    defaults: dict[str, Any] = {
        "max_rollouts": max_rollouts,
        "updates_per_rollout": 2,
        "scheduler": schedule,
        "reference": FrozenCopy(),
        "kl_coef": 0.01,
    }
    return make_module(policy, **(defaults | options))


class Refill(RolloutCallback):
    """Drops groups without signal, asks for more, and remembers how many were useful: decisions that must repeat."""

    def __init__(self) -> None:
        self.useful: list[int] = []

    def on_plan(self, trainer: Any, module: Any, prompts: int) -> int:
        return prompts + sum(self.useful[-3:]) % 3

    def on_rewards(self, trainer: Any, module: Any, rollouts: Any) -> Any:
        low = rollouts.group_mean(rollouts.rewards)
        keep = (low > 0) & (low < 1)
        self.useful.append(int(all_sum(keep.sum())))
        return rollouts.select_groups(keep)

    def on_collected(self, trainer: Any, module: Any, rollouts: Any) -> int:
        return max(0, module.prompts_per_step // world_size() - len(rollouts.prompts))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.clock % 3 == 0:
            pl_module.log("refill/useful", float(sum(self.useful)))  # now and then, not at every step

    def state_dict(self) -> dict[str, Any]:
        return {"useful": list(self.useful)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.useful = list(state_dict["useful"])


def logged_run(
    folder: Path,
    policy: Path,
    max_rollouts: int = 12,
    checkpoint: Path | None = None,
    every: int = 2,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> RLModule:
    """A run with TensorBoard, validation, checkpoints and stateful callbacks; returns its module."""
    module = full_module(policy, max_rollouts, **options)
    # TensorBoard reads event files in the order of their names, which hold the second in which they were begun.
    wait_until(lambda: not list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")))
    train(
        folder,
        module,
        [Refill(), *callbacks, RolloutCheckpoint(every_n_rollouts=every)],
        checkpoint=checkpoint,
        logger=TensorBoardLogger(str(folder), name="", version=""),
        limit_val_batches=1.0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    return module


def run_in_child(folder: Path, policy: Path, max_rollouts: int, every: int, pause: float, after: int = 0) -> None:
    """`logged_run` as the command line ends it: exit status 130 or 143 after a signal."""
    module = logged_run(folder, policy, max_rollouts, every=every, callbacks=[Pause(pause, after)])
    saver = next(c for c in module.trainer.callbacks if isinstance(c, RolloutCheckpoint))
    sys.exit(0 if saver.received is None else 128 + saver.received)


class Pause(Callback):
    """Slows steps down from a clock on, so that whoever signals the run meets it at work, and leaves a file then."""

    def __init__(self, seconds: float, after: int) -> None:
        self.seconds, self.after = seconds, after

    def on_rollouts(self, trainer: Any, module: Any, rollouts: Any) -> None:
        if module.clock >= self.after:
            (module.run_dir / "pausing").touch()
            time.sleep(self.seconds)


def wait_until(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    """Poll, and fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run's directory, by name, without what no two runs have in common."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith(UNREPEATABLE)]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
