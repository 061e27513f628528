# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step: collected where they arise, reduced over ranks once, written once, at the step's clock."""

from __future__ import annotations

import inspect
import math
import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rl.distributed import all_gather_concat, all_max, all_sum, union_of_names
from lit_rl.methods.terms import Signals
from lit_rl.rollouts import Rollouts, StopReason

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule

PROGRESS_BAR = ("reward/mean", "rollout/length_mean", "speed/tokens_per_second", "val/pass@1")
_LOG_DEFAULTS = {key: p.default for key, p in inspect.signature(LightningModule.log).parameters.items()}
_TOTAL = -1.0  # in place of a count: the entry is a sum over ranks, not a mean


class Ledger:
    """Sums, maxima and seconds of one training step.

    The ranks may have measured different things: names are matched before they are reduced. Callbacks add to
    ``module.ledger`` in any hook before `on_metrics`, where the numbers are final.
    """

    def __init__(self) -> None:
        self.signals = Signals()
        self.seconds: dict[str, float] = {}
        self.closed = False

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time spent inside to ``time/<name>``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def mean(self, name: str, values: Tensor | float, where: Tensor | None = None) -> None:
        """Add values (those at ``where``) to the mean logged as ``name``; NaN values are left out.

        Args:
            name: of the log line.
            values: one number, or a tensor of any shape: rows ``[N]``, tokens ``[N, T]``.
            where: bool, the same shape; all by default.

        Raises:
            RuntimeError: the numbers of the step are final already, here and in the other methods.
        """
        self._check_open(name)
        values = torch.as_tensor(values)
        valid = ~torch.isnan(values) if values.is_floating_point() else torch.ones_like(values, dtype=torch.bool)
        self.signals.mean(name, values, valid if where is None else valid & where)

    def total(self, name: str, value: float | Tensor) -> None:
        """Add to the sum over ranks logged as ``name``."""
        self._check_open(name)
        value = torch.as_tensor(value, dtype=torch.float32)
        if name in self.signals.sums:
            value = value + self.signals.sums[name][0].to(value.device)
        self.signals.sums[name] = (value, torch.tensor(_TOTAL))

    def largest(self, name: str, values: Tensor | float, where: Tensor | None = None) -> None:
        """Let values (those at ``where``) compete for the maximum logged as ``name``."""
        self._check_open(name)
        values = torch.as_tensor(values)
        valid = torch.ones_like(values, dtype=torch.bool) if where is None else where
        self.signals.largest(name, values, valid)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Everything as plain numbers, the same on every rank: one sum and one maximum over the ranks."""
        self.closed = True
        names = union_of_names(self.signals.sums)
        nothing = (torch.zeros(()), torch.zeros(()))
        sums = _packed([x for name in names for x in self.signals.sums.get(name, nothing)], device)
        pairs = all_sum(sums).reshape(-1, 2).tolist()
        seconds = {f"time/{name}": torch.tensor(value) for name, value in self.seconds.items()}
        peaks = {**seconds, **self.signals.maxima}
        peak_names = union_of_names(peaks)
        lowest = torch.tensor(-math.inf)
        highest = all_max(_packed([peaks.get(name, lowest) for name in peak_names], device)).tolist()
        out = {name: total if count < 0 else total / count for name, (total, count) in zip(names, pairs) if count}
        return out | {name: value for name, value in zip(peak_names, highest) if value > -math.inf}

    def _check_open(self, name: str) -> None:
        if self.closed:
            raise RuntimeError(
                f"{name!r} comes too late: the numbers of this step are final. Use the ledger in an earlier hook than "
                "on_metrics; there, put numbers that are the same on every rank into `metrics`."
            )


def _packed(numbers: list[Tensor], device: torch.device) -> Tensor:
    """Scalars as one float64 vector on the device."""
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([x.detach().to(device, torch.float64) for x in numbers])


def rollout_statistics(rollouts: Rollouts, ledger: Ledger) -> None:
    """Record what a batch looks like after every hook has run: rewards, lengths, ends, signal."""
    rollouts = reported_rows(rollouts)
    rewards = rollouts.rewards
    if rollouts.reward_terms:
        ledger.mean("reward/mean", rewards)
        ledger.mean("_reward_square", rewards.double().square())
        ledger.mean("rollout/unscorable_ratio", torch.isnan(rewards).float())
        ledger.mean("rollout/zero_signal_ratio", zero_signal(rollouts).float())
    for name, values in rollouts.reward_terms.items():
        ledger.mean(f"reward/{name}", values)  # a term of weight 0 is watched
    ledger.mean("rollout/correct_ratio", rollouts.correct)
    generated = rollouts.generated.float()
    ledger.mean("rollout/length_mean", generated)
    ledger.mean("rollout/kept_length_mean", rollouts.lengths.float())
    lengths, _ = all_gather_concat(generated)
    if len(lengths):
        ledger.largest("rollout/length_p95", lengths.quantile(0.95))
    ledger.mean("rollout/truncated_ratio", (rollouts.row["stop_reason"] == StopReason.LENGTH).float())
    if "entropy" in rollouts.token:
        ledger.mean("policy/entropy", rollouts.token["entropy"], rollouts.completion_mask)
    ledger.largest("memory/peak_gib", torch.tensor(peak_memory_gib(rollouts.device)))
    ledger.total("rollout/completions", float(len(rollouts)))
    ledger.total("rollout/tokens", generated.sum())


def reported_rows(rollouts: Rollouts) -> Rollouts:
    """The rows that statistics are about: those that a model wrote, or all where there are none (supervised training).

    Replayed text beside them would hide what the policy does.
    """
    sampled = rollouts.sampled
    anywhere = all_max(sampled.any().long())  # a rank that drew nothing but demonstrations reports none of them
    return rollouts.select(sampled) if int(anywhere) and not bool(sampled.all()) else rollouts


def zero_signal(rollouts: Rollouts) -> Tensor:
    """``[B]`` bool: groups whose advantages are all zero, so that they teach nothing."""
    signal = torch.zeros(len(rollouts), dtype=torch.long, device=rollouts.device)
    if rollouts.width:
        signal = (rollouts.advantages != 0).any(1).long()
    count = torch.zeros(len(rollouts.prompts), dtype=torch.long, device=rollouts.device)
    return count.index_add(0, rollouts.group, signal) == 0


class Reporting:
    """How an `RLModule` reports numbers while it trains.

    Lightning keeps a metric object for every name, which costs several milliseconds a step, and repeats the last value
    of a name at every later step, so that something measured now and then looks like a constant. Here a number belongs
    to the step in which it was logged: it is in ``trainer.callback_metrics`` until the next step begins, and is written
    once all callbacks have seen the step's end, at x = ``clock``.
    """

    numbers: dict[str, float]  # of the step that runs, not yet written
    _written: set[str]

    def init_reporting(self: RLModule) -> None:
        """Nothing was measured yet."""
        self.numbers, self._written = {}, set()

    def log(
        self: RLModule, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, **options: Any
    ) -> None:
        """As in Lightning; in training a plain number takes the short way described above."""
        plain = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        special = any(option and option != _LOG_DEFAULTS.get(key) for key, option in options.items())
        if plain and not special and logger is not False and self.trainer.training:
            self.log_numbers({name: float(value)}, [name] if prog_bar else ())
        else:
            super().log(name, value, prog_bar, logger, **options)  # type: ignore[safe-super]

    def log_numbers(self: RLModule, numbers: Mapping[str, float], prog_bar: Collection[str] = ()) -> None:
        """Log numbers of the step that runs, the same on every rank; those in ``prog_bar`` in the progress bar too."""
        self.numbers.update(numbers)
        self.show_numbers(numbers, prog_bar)

    def show_numbers(self: RLModule, numbers: Mapping[str, float], prog_bar: Collection[str] = ()) -> None:
        """Let monitors and the progress bar see numbers."""
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        self.trainer.progress_bar_metrics.update({name: numbers[name] for name in prog_bar if name in numbers})

    def write_numbers(self: RLModule, numbers: Mapping[str, float]) -> None:
        """Hand numbers to the loggers, all at once, at the clock of the step that was last."""
        for logger in self.loggers:
            write_scalars(logger, dict(numbers), step=max(0, self.clock - 1))
            logger.save()

    def end_reporting(self: RLModule) -> None:
        """Every callback has seen the end of the step: write what it and they measured."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = self.clock % every == 0 or self.trainer.should_stop
        if due and self.numbers and not self.interrupted:
            self.write_numbers(self.numbers)
        self._written, self.numbers = set(self.numbers), {}

    def begin_reporting(self: RLModule) -> None:
        """A new step begins: monitors no longer see what the last one logged."""
        for name in self._written:
            self.trainer.callback_metrics.pop(name, None)
        self._written = set()

    def complete(self: RLModule, numbers: dict[str, float]) -> dict[str, float]:
        """The numbers of a step with those that follow from others."""
        square = numbers.pop("_reward_square", None)
        if square is not None:
            numbers["reward/std"] = max(0.0, square - numbers["reward/mean"] ** 2) ** 0.5
        weight_square = numbers.pop("_correction_square", None)
        if weight_square is not None:  # effective sample share (Σw)² / (n Σw²)
            numbers["policy/correction_ess"] = numbers["policy/correction_mean"] ** 2 / max(weight_square, 1e-300)
        numbers["speed/tokens_per_second"] = numbers.get("rollout/tokens", 0.0) / numbers["time/step"]
        numbers["rollout_step"] = float(self.rollout_step)
        if self.skipped_updates:
            numbers["policy/skipped_updates"] = float(self.skipped_updates)
        return numbers


def tensorboard_file(logger: Any) -> Any:
    """The file that a TensorBoard logger writes on this rank, or None."""
    from torch.utils.tensorboard import SummaryWriter

    experiment = getattr(logger, "experiment", None)  # a stand-in that ignores everything on other ranks than 0
    return experiment.file_writer if isinstance(experiment, SummaryWriter) else None


def write_scalars(logger: Any, numbers: dict[str, float], step: int) -> None:
    """Log numbers; TensorBoard gets all of a step as one event, because its writer takes as long for one as for all."""
    from lightning.pytorch.loggers import TensorBoardLogger

    plain = isinstance(logger, TensorBoardLogger) and type(logger).log_metrics is TensorBoardLogger.log_metrics
    file = tensorboard_file(logger) if plain and not logger._prefix else None
    if file is None:
        logger.log_metrics(numbers, step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    file.add_summary(Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]), step)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
