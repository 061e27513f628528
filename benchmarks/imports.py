# SPDX-License-Identifier: Apache-2.0
"""Seconds that a user waits before anything happens: importing the package, and asking for help.

    python benchmarks/imports.py

Every figure is the wall time of a fresh interpreter. For `lit-rl fit --help` the yardstick is a LightningCLI with the
same arguments (a model and a datamodule as subclasses, all of Trainer) and nothing of lit-rl.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Report, Table, arguments, finish, hardware, median, spread

PLAIN_CLI = """
import sys
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
LightningCLI(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)
"""
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import lit_rl": ["-c", "import lit_rl"],
    "import torch": ["-c", "import torch"],
    "LightningCLI fit --help": ["-c", PLAIN_CLI, "fit", "--help"],
    "lit-rl fit --help": ["-m", "lit_rl.cli", "fit", "--help"],
    "lit-rl --help": ["-m", "lit_rl.cli", "--help"],
}


def seconds_of(command: list[str]) -> float:
    """Wall time of a Python process that must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run every command in turn, so that a busy moment hits all of them."""
    parser = arguments(__doc__)
    options = parser.parse_args()
    repeats = 1 if options.smoke else options.repeats
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, command in COMMANDS.items():
            seconds = seconds_of(command)
            if repeat:  # the first round fills the disk cache
                times[name].append(seconds)
    medians = {name: median(values) for name, values in times.items()}
    rows = [{"": f"`{name}`", "seconds": medians[name], "range": spread(values)} for name, values in times.items()]
    bare = medians["python -c pass"]
    more = medians["lit-rl fit --help"] - medians["LightningCLI fit --help"]
    report = Report(
        "imports",
        "Import and help",
        f"Wall time of fresh interpreters, medians of {repeats}.",
        hardware(),
        {"repeats": repeats},
        [Table("Start-up", rows)],
        [
            Goal("import lit_rl, beyond the bare interpreter", medians["import lit_rl"] - bare, "at most", 0.3, "s"),
            Goal("lit-rl fit --help, beyond LightningCLI's own", more, "at most", 0.5, "s"),
        ],
    )
    finish(report, options)


if __name__ == "__main__":
    main()
