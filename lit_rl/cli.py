# SPDX-License-Identifier: Apache-2.0
"""The command line: ``lit-rl fit|validate|test|predict`` (LightningCLI) and a few commands of our own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Two torch threads that spin next to a busy neighbour are several times slower than one: give the core up sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_rl.checkpoint import DurableCheckpointIO, RolloutCheckpoint, last_good_checkpoint
from lit_rl.progress import RolloutProgressBar

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 20,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "default_root_dir": "runs/default",
}


class LitRLCLI(LightningCLI):
    """LightningCLI with rollout checkpoints, a directory for each run, ``--ckpt_path last`` and ``--print_plan``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutProgressBar, "progress")
        parser.add_argument("--print_plan", action="store_true", help="Print the run header and memory plan, and stop.")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Move an earlier run in the same directory out of the way."
        )

    def before_instantiate_classes(self) -> None:
        """Give the run its directory: one logger there, and the checkpoint to resume from."""
        config = self.config[self.subcommand]
        run_dir = Path(config.trainer.default_root_dir)
        if config.trainer.enable_progress_bar is False:  # Lightning refuses this beside a progress bar of our own
            config.trainer.enable_progress_bar, config.progress.refresh_rate = None, 0
        if config.trainer.logger in (None, True):
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.TensorBoardLogger",
                init_args=Namespace(save_dir=str(run_dir), name="", version="", default_hp_metric=False),
            )
        if config.get("ckpt_path") == "last":
            config.ckpt_path = resolve_last(run_dir)
        elif self.subcommand == "fit" and config.get("ckpt_path") is None and not config.print_plan:
            make_room(run_dir, config.overwrite)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the durable checkpoint writer to whatever plugins the user configured."""
        trainer = self._get(self.config_init, "trainer")
        plugins = trainer.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        return super().instantiate_trainer(plugins=[*plugins, DurableCheckpointIO()], **kwargs)

    def before_fit(self) -> None:
        if self.config_init[self.subcommand].print_plan:
            from lit_rl.header import run_header

            print(run_header(self.model, self.trainer.world_size))
            sys.exit(0)


def resolve_last(run_dir: Path) -> str | None:
    """Path of the newest intact checkpoint of a run; None (start afresh) if the run has not saved any yet."""
    path = last_good_checkpoint(run_dir)
    if path is None:
        print(f"No checkpoint below {run_dir} yet: starting from the beginning.", file=sys.stderr)
    return None if path is None else str(path)


def make_room(run_dir: Path, overwrite: bool) -> None:
    """Never mix two runs: a directory that already holds one is refused, or moved aside with ``overwrite``.

    Raises:
        SystemExit: with a sentence that says what to do.
    """
    if not list(run_dir.glob("checkpoints/*.ckpt")) and not list(run_dir.glob("events.out.tfevents*")):
        return
    if not overwrite:
        raise SystemExit(
            f"{run_dir} already holds a run. Continue it with --ckpt_path last, choose another "
            "--trainer.default_root_dir, or pass --overwrite true to move it aside."
        )
    n = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old{n}")).exists():
        n += 1
    run_dir.rename(aside)
    print(f"The earlier run was moved to {aside}.", file=sys.stderr)


def own_commands() -> dict[str, Callable[..., Any]]:
    """Commands beside LightningCLI's: name -> function whose signature is its command line."""
    from lit_rl.commands import export, new_policy

    return {"export": export, "new-policy": new_policy}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lit-rl``."""
    argv = list(sys.argv[1:] if args is None else args)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if argv and not argv[0].startswith("-"):
        commands = own_commands() if argv[0] not in LightningCLI.subcommands() else {}
        if argv[0] in commands:
            from jsonargparse import auto_cli

            auto_cli(commands[argv[0]], args=argv[1:], as_positional=True)
            return
    cli = LitRLCLI(
        model_class=LightningModule,
        datamodule_class=LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        save_config_kwargs={"overwrite": True},
        args=argv,
    )
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    received = next((c.received for c in callbacks if isinstance(c, RolloutCheckpoint)), None)
    if received is not None:
        sys.exit(128 + received)


if __name__ == "__main__":
    main()
