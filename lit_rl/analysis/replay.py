# SPDX-License-Identifier: Apache-2.0
"""Recompute the loss terms of a logged step from its stored batch and a checkpoint of the weights before it.

The update is done once more by the run's own code, on the batch that `RolloutLogger` stored, with the weights, the
optimizer and the callbacks of the checkpoint that was written just before that step. If that checkpoint is gone, the
run is trained forward to the step from the newest earlier one. All files are written to a temporary folder.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from lit_rl.checkpoint import is_intact
from lit_rl.lightning_cli import LitRLCLI
from lit_rl.rollouts import Rollouts
from lit_rl.storage import load_rollouts

PREFIX = "loss/"


@dataclass
class ReplayedTerm:
    """One loss term as it was logged and as it comes out again.

    Attributes:
        name: the term.
        logged: value in the run's TensorBoard files.
        replayed: value that was computed again.
    """

    name: str
    logged: float
    replayed: float

    @property
    def error(self) -> float:
        """Difference, relative to the logged value where that is larger than 1."""
        return abs(self.logged - self.replayed) / max(1.0, abs(self.logged))


@dataclass
class Replay:
    """The outcome of a replay.

    Attributes:
        clock: the step.
        start: clock of the checkpoint that the replay started from; 0 without a checkpoint: the beginning of the run.
        stored: whether the batch is the stored one; otherwise the prompts were drawn and answered again.
        terms: the loss terms.
    """

    clock: int
    start: int
    stored: bool
    terms: list[ReplayedTerm] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest difference of any term."""
        return max(term.error for term in self.terms)

    def __str__(self) -> str:
        lines = [f"step at clock {self.clock}, {'stored batch' if self.stored else 'batch sampled again'}, "]
        steps = self.clock - self.start
        where = f"the checkpoint at clock {self.start}" if self.start else "the initial policy"
        if steps:
            lines[0] += f"weights trained forward {steps} step{'s' * (steps > 1)} from {where}"
        else:
            lines[0] += f"weights of {where}"
        lines.append(f"{'term':<20}{'logged':>16}{'replayed':>16}{'difference':>14}")
        lines += [f"{t.name:<20}{t.logged:>16.8g}{t.replayed:>16.8g}{t.error:>14.2e}" for t in self.terms]
        return "\n".join(lines)


def replay(run: Path | str, clock: int) -> Replay:
    """Replay one step of a run (in one process, also of a run of several ranks).

    Exact where a run is: the same machine, thread count and versions. Extra inputs of the forward pass
    (``model_inputs``) are not stored, and so neither is a callback's batch that it returns from ``on_loss_weights``
    instead of editing the one it was given.

    Args:
        run: the run's directory.
        clock: which step: the x-axis of its logs.

    Raises:
        FileNotFoundError: the run has no ``config.yaml``.
        ValueError: nothing was logged at that clock.
    """
    run = Path(run)
    if not (run / "config.yaml").exists():
        raise FileNotFoundError(f"{run / 'config.yaml'} is missing: it says what the run consists of.")
    logged = {k: v for k, v in logged_values(run, clock).items() if k.startswith(PREFIX)}
    if not logged:
        raise ValueError(f"{run} logged no loss term at clock {clock}. {available(run)}")
    checkpoint = checkpoint_before(run, clock)
    with tempfile.TemporaryDirectory(prefix="lit-rl-replay-") as scratch:
        copy_state(run, Path(scratch))
        replayer = Replayer(clock, stored_batch(run, clock))
        components = Components(run, Path(scratch), replayer)
        components.trainer.fit(
            components.model, datamodule=components.datamodule, ckpt_path=checkpoint, weights_only=True
        )
    measured = replayer.measured
    terms = [ReplayedTerm(k.removeprefix(PREFIX), v, measured[k]) for k, v in logged.items() if k in measured]
    start = 0 if checkpoint is None else clock_of(checkpoint)
    return Replay(clock, start, replayer.batch is not None, terms)


class Replayer(Callback):
    """Runs up to one step, puts a stored batch in the place of the stages before its update, and stops after it.

    Args:
        clock: the step.
        batch: the stored batch; None: sample again.
    """

    def __init__(self, clock: int, batch: Rollouts | None) -> None:
        self.clock, self.batch = clock, batch
        self.measured: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Replace collect, recall and credit in the step that is replayed."""
        if pl_module.clock != self.clock or self.batch is None:
            return
        stored = self.batch.to(pl_module.device)
        pl_module.collect = lambda: stored
        pl_module.recall = pl_module.credit = lambda rollouts: rollouts
        if pl_module.updates_per_step == 1:  # the stored loss weights are those after the hook; else before it
            for callback in trainer.callbacks:
                callback.on_loss_weights = lambda *args: None

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Keep the numbers of the step."""
        if module.clock == self.clock:
            self.measured = dict(metrics)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the step."""
        if self.measured:
            trainer.should_stop = True


class Components(LitRLCLI):
    """What a run's configuration describes, for one process and another directory; nothing is run.

    Args:
        run: directory of the run.
        folder: where everything that is written goes to.
        extra: a further callback.
    """

    def __init__(self, run: Path, folder: Path, extra: Callback) -> None:
        self.extra = extra
        settings = {
            "trainer.logger": "false",
            "trainer.default_root_dir": folder,
            "trainer.devices": 1,
            "trainer.num_nodes": 1,
            "trainer.strategy": "auto",
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "null",
            "progress.refresh_rate": 0,
            "checkpoint.folder": folder / "checkpoints",
        }
        args = ["fit", "--config", str(run / "config.yaml"), *(f"--{k}={v}" for k, v in settings.items())]
        super().__init__(args, save_config_callback=None)

    def before_instantiate_classes(self) -> None:
        """No run directory is needed."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Without checkpoints that the user asked for, which have their own directories."""
        callbacks = self._get(self.config_init, "trainer").get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        kept = [c for c in callbacks if not isinstance(c, Checkpoint)]
        return super().instantiate_trainer(callbacks=[*kept, self.extra], **kwargs)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Called by LightningCLI instead of the trainer's."""


def logged_values(run: Path, clock: int) -> dict[str, float]:
    """The scalars that a run logged at a clock: name -> value."""
    events = _events(run)
    found = {name: [e.value for e in events.Scalars(name) if e.step == clock] for name in events.Tags()["scalars"]}
    return {name: values[-1] for name, values in found.items() if values}


def available(run: Path) -> str:
    """Which steps can be replayed, in a sentence."""
    events = _events(run)
    names = [name for name in events.Tags()["scalars"] if name.startswith(PREFIX)]
    steps = sorted({e.step for name in names for e in events.Scalars(name)})
    logged = f"Logged are clocks {steps[0]} to {steps[-1]}" if steps else "Nothing is logged"
    stored = ", ".join(str(c) for c in sorted({clock_of(p) for p in (run / "rollouts").glob("clock*.safetensors")}))
    saved = ", ".join(str(c) for c in sorted({clock_of(p) for p in run.rglob("clock*.ckpt")}))
    return f"{logged}; batches are stored of {stored or 'none'}; checkpoints are at {saved or 'none'}."


def _events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()


def clock_of(path: Path) -> int:
    """The clock in the name of a checkpoint or rollout file."""
    match = re.match(r"clock(\d+)", path.name)
    if match is None:
        raise ValueError(f"{path.name} does not start with clock<number>.")
    return int(match[1])


def checkpoint_before(run: Path, clock: int) -> Path | None:
    """The newest intact checkpoint with the weights before a step, or earlier ones."""
    found = [p for p in run.rglob("clock*.ckpt") if clock_of(p) <= clock]
    return next((p for p in sorted(found, key=clock_of, reverse=True) if is_intact(p)), None)


def stored_batch(run: Path, clock: int) -> Rollouts | None:
    """The batch of a step over all ranks, if it was stored."""
    names = sorted(p.stem for p in (run / "rollouts").glob(f"clock{clock:08d}-rank*.safetensors"))
    return Rollouts.cat([load_rollouts(run / "rollouts", name) for name in names]) if names else None


def copy_state(run: Path, folder: Path) -> None:
    """Copy what callbacks keep on disk (the states that they may go back to), leaving out logs and checkpoints."""
    ignored = shutil.ignore_patterns("*.ckpt*", "events.*", "rollouts", "predictions", "nonfinite", "*.yaml")
    shutil.copytree(run, folder, ignore=ignored, dirs_exist_ok=True)
