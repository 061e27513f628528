# SPDX-License-Identifier: Apache-2.0
"""Starting is quick: nothing heavy is imported before it is needed, and no parser is built for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from lit_rl.lightning_cli import LitRLCLI

HEAVY = ("torch", "lightning", "transformers", "numpy", "datasets", "peft", "tensorboard", "safetensors")


def in_a_fresh_process(program: str) -> Any:
    """What a program prints as JSON."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_is_cheap():
    seconds, heavy = in_a_fresh_process(
        "import json, sys, time; start = time.process_time(); import lit_rl; "
        f"print(json.dumps([time.process_time() - start, [m for m in {HEAVY} if m in sys.modules]]))"
    )
    assert heavy == []
    assert seconds < 0.3


def test_help_and_version_import_nothing_heavy_and_name_every_command():
    heavy = in_a_fresh_process(
        "import json, sys; from lit_rl.cli import main; main([]); main(['--version']); "
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    assert heavy == []


def test_a_class_beside_the_yaml_can_be_named(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from lit_rl.callbacks import RewardAlarm\n\nclass Mine(RewardAlarm):\n    pass\n"
    )
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [{class_path: mine.Mine}]}\n")
    command = [str(Path(sys.executable).with_name("lit-rl")), "fit", "--config", "mine.yaml", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "class_path: mine.Mine" in done.stdout, done.stderr


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]):
    from lit_rl.cli import LIGHTNING_COMMANDS, main, own_commands

    main(["--help"])
    printed = capsys.readouterr().out
    for command in (*LIGHTNING_COMMANDS, *own_commands()):
        assert f"\n  {command} " in printed


def test_what_we_import_beside_lightning_takes_little_time():
    seconds = in_a_fresh_process(
        "import json, time; import lightning.pytorch.cli; start = time.process_time(); import lit_rl.lightning_cli; "
        "print(json.dumps(time.process_time() - start))"
    )
    assert seconds < 0.4


def test_help_of_fit_is_built_no_slower_than_lightnings_own(capsys: pytest.CaptureFixture[str]):
    def seconds(build: Any) -> float:
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            with pytest.raises(SystemExit):
                build()
            best = min(best, time.process_time() - start)
        return best

    ours = seconds(lambda: LitRLCLI(["fit", "--help"]))
    modes = {"subclass_mode_model": True, "subclass_mode_data": True}
    theirs = seconds(lambda: LightningCLI(LightningModule, LightningDataModule, args=["fit", "--help"], **modes))
    assert "--checkpoint.every_n_rollouts" in capsys.readouterr().out
    assert ours < theirs + 0.1
