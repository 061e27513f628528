# SPDX-License-Identifier: Apache-2.0
"""`LitRLCLI`: LightningCLI with a directory for each run, durable checkpoints, a run header and plain messages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lit_rl.checkpoint import SUFFIX, DurableCheckpointIO, RolloutCheckpoint, last_good_checkpoint
from lit_rl.complaints import PlainMessages
from lit_rl.predictions import PredictionWriter
from lit_rl.progress import RolloutProgressBar
from lit_rl.spelling import did_you_mean

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 20,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "default_root_dir": "runs/default",
}


_NONE = re.compile(r"(--[\w.]+=)None")


class Parser(PlainMessages, LightningArgumentParser):
    """Lightning's parser with messages of one sentence."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """``--key=None`` is ``--key=null``: jsonargparse hands a null on to nested parsers in Python's spelling."""
        words = sys.argv[1:] if args is None else args
        return super().parse_args(
            [_NONE.sub(r"\1null", w) if _NONE.fullmatch(w) else w for w in words], *rest, **options
        )


class SaveConfig(SaveConfigCallback):
    """Saves the configuration when training really starts, so that a run that was refused leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config.yaml`` into the run's directory."""
        super().setup(trainer, pl_module, "fit")


class LitRLCLI(LightningCLI):
    """The command line of ``lit-rl fit|validate|test|predict``.

    Args:
        args: the arguments, the subcommand first.
        options: arguments of LightningCLI, for command lines of your own.
    """

    def __init__(self, args: list[str], **options: Any) -> None:
        self.wanted = args[0] if args and args[0] in LightningCLI.subcommands() else None
        defaults: dict[str, Any] = {
            "model_class": LightningModule,
            "datamodule_class": LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "trainer_defaults": TRAINER_DEFAULTS,
            "parser_class": Parser,
            "parser_kwargs": {"prog": "lit-rl"},
            "auto_configure_optimizers": False,
            "seed_everything_default": False,
            "save_config_callback": SaveConfig,
            "save_config_kwargs": {"overwrite": True},
        }
        super().__init__(args=args, **{**defaults, **options})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the parser that is needed is built: each takes a tenth of a second."""
        every = LightningCLI.subcommands()
        return every if self.wanted is None else {self.wanted: every[self.wanted]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning warns of arguments that are handed over while the process has some, too; here that is normal."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutProgressBar, "progress")
        parser.add_argument(
            "--print_plan", action="store_true", help="Print the run header with its memory plan, and load nothing."
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Move an earlier run in the same directory out of the way."
        )

    def before_instantiate_classes(self) -> None:
        """Give the run its directory: one logger there, and the checkpoint to start from."""
        config = self.config[self.subcommand]
        run_dir = Path(config.trainer.default_root_dir)
        if config.trainer.enable_progress_bar is False:  # Lightning refuses this beside a progress bar of our own
            config.trainer.enable_progress_bar, config.progress.refresh_rate = None, 0
        if config.print_plan:
            config.trainer.logger = False
        elif config.trainer.logger in (None, True):
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.TensorBoardLogger",
                init_args=Namespace(save_dir=str(run_dir), name="", version="", default_hp_metric=False),
            )
        self.choose_weights(config, run_dir)
        if self.subcommand == "predict" and config.get("return_predictions") is None:
            config.return_predictions = False  # they are in files

    def choose_weights(self, config: Namespace, run_dir: Path) -> None:
        """Find or refuse the checkpoint that was asked for; without one make room for a run, or say what is measured.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            FileExistsError: the directory of a new run holds one already.
        """
        wanted, training = config.get("ckpt_path"), self.subcommand == "fit"
        if wanted in ("last", "best"):
            config.ckpt_path = resolve_checkpoint(run_dir, wanted, required=not training)
        elif wanted is not None:
            require_checkpoint(wanted, run_dir)
        elif training and not config.print_plan:
            make_room(run_dir, config.overwrite)
        elif not training and any(run_dir.rglob(f"*{SUFFIX}")):
            best = " or --ckpt_path best" if any(run_dir.rglob("best*.ckpt")) else ""
            print(
                f"{self.subcommand} takes the policy of model.init_args.policy as it is. For the one that was trained "
                f"in {run_dir} add --ckpt_path last{best}.",
                file=sys.stderr,
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the durable checkpoint writer, and for predictions their writer, to what the user configured."""
        config = self._get(self.config_init, "trainer")
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if self.subcommand == "predict":
            callbacks = config.get("callbacks") or []
            callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
            if not any(isinstance(c, PredictionWriter) for c in callbacks):
                kwargs["callbacks"] = [*callbacks, PredictionWriter()]
        return super().instantiate_trainer(plugins=[*plugins, DurableCheckpointIO()], **kwargs)

    def before_fit(self) -> None:
        if self.config_init[self.subcommand].print_plan:
            print(self.plan())
            sys.exit(0)

    def plan(self) -> str:
        """The run header after all checks of set-up; no weights are loaded and no file is written."""
        from lit_rl.header import run_header

        model: Any = self.model
        trainer: Any = self.trainer
        trainer.datamodule, model.trainer = self.datamodule, trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        model.check_setup("fit")
        return run_header(model, trainer.world_size)


def resolve_checkpoint(run_dir: Path, which: str, required: bool, option: str = "--ckpt_path") -> str | None:
    """Path of the ``last`` or ``best`` intact checkpoint of a run.

    Args:
        run_dir: the run's directory.
        which: ``last``: the newest that `RolloutCheckpoint` wrote. ``best``: the one whose file name starts with
            ``best`` (see ``configs/best_checkpoint.yaml``).
        required: whether there must be one. Otherwise a run without any starts from the beginning.
        option: how the user says which.

    Raises:
        FileNotFoundError: there is none, but one is required.
        ValueError: there are several best ones.
    """
    if which == "best":
        found = sorted(run_dir.rglob("best*.ckpt"))
        if len(found) > 1:
            names = ", ".join(str(p) for p in found)
            raise ValueError(f"There are several best checkpoints: pass one of {names} as {option}.")
        path = found[0] if found else None
    else:
        path = last_good_checkpoint(run_dir)
    if path is None and (required or which == "best"):
        hint = " (callbacks of configs/best_checkpoint.yaml write one)" if which == "best" else ""
        raise FileNotFoundError(
            f"There is no {which} checkpoint below {run_dir}{hint}: train first, or name a file with {option}."
            + (" Without it the policy is taken as it is in model.init_args.policy." if option == "--ckpt_path" else "")
        )
    if path is None:
        print(f"No checkpoint below {run_dir} yet: starting from the beginning.", file=sys.stderr)
    return None if path is None else str(path)


def require_checkpoint(path: Any, run_dir: Path, option: str = "--ckpt_path") -> None:
    """Refuse a checkpoint that is not there before anything is loaded.

    Args:
        path: what the user gave; an address or a word of Lightning's (``hpc``, ``registry``) is left to Lightning.
        run_dir: the run's directory, whose checkpoints are suggested.
        option: how the user gave it.

    Raises:
        FileNotFoundError: with what may have been meant.
    """
    name = str(path)
    if "://" in name or name.partition(":")[0] in ("hpc", "registry") or Path(name).expanduser().exists():
        return
    known = [str(p) for p in run_dir.rglob(f"*{SUFFIX}")]
    hint = did_you_mean(name, ["last", "best"]) or did_you_mean(name, known)
    raise FileNotFoundError(f"There is no checkpoint {name}: give a file, last or best to {option}.{hint}")


def make_room(run_dir: Path, overwrite: bool) -> None:
    """Never mix two runs: a directory that already holds one is refused, or moved aside with ``overwrite``.

    Raises:
        FileExistsError: with a sentence that says what to do.
    """
    if not (run_dir / "config.yaml").exists() and not list(run_dir.glob("checkpoints/*.ckpt")):
        return  # nothing, or only evaluations
    if not overwrite:
        raise FileExistsError(
            f"{run_dir} already holds a run. Continue it with --ckpt_path last, choose another "
            "--trainer.default_root_dir, or pass --overwrite true to move it aside."
        )
    n = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old{n}")).exists():
        n += 1
    run_dir.rename(aside)
    print(f"The earlier run was moved to {aside}.", file=sys.stderr)


def run(args: list[str]) -> None:
    """Run one of Lightning's subcommands; a run that a signal stopped exits with 128 + the signal's number."""
    cli = LitRLCLI(args)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    received = next((c.received for c in callbacks if isinstance(c, RolloutCheckpoint)), None)
    if received is not None:
        sys.exit(128 + received)
