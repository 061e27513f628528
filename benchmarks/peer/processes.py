# SPDX-License-Identifier: Apache-2.0
"""Runs either side of a comparison in a process of its own, TRL in an environment that is made for it once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.peer.spec import Outcome, Spec

TRL = "trl==1.16.*"
ENVIRONMENT = ROOT / ".venv-trl"
SIDES = {"lit-rl": "ours.py", "TRL": "trl_side.py"}


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made at the first call (about a minute and 2 GB)."""
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / ".ready"
    if not ready.exists():
        import torch

        print(f"Making an environment for {TRL} in {ENVIRONMENT} …", file=sys.stderr, flush=True)
        venv.EnvBuilder(with_pip=True).create(ENVIRONMENT)
        version = torch.__version__.partition("+")[0]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *constraints, TRL, f"torch=={version}"], check=True)
        ready.touch()
    return python


def run_side(side: str, spec: Spec) -> Outcome:
    """Run one side.

    Raises:
        RuntimeError: the process failed; the end of what it printed is in the message.
    """
    python = trl_python() if side == "TRL" else Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        given, measured = Path(folder) / "spec.json", Path(folder) / "outcome.json"
        given.write_text(json.dumps(asdict(spec)))
        script = ROOT / "benchmarks" / "peer" / SIDES[side]
        process = subprocess.run(
            [str(python), str(script), str(given), str(measured)], cwd=ROOT, capture_output=True, text=True
        )
        if process.returncode:
            raise RuntimeError(f"{side} failed:\n{(process.stdout + process.stderr)[-3000:]}")
        return Outcome(**json.loads(measured.read_text()))


if __name__ == "__main__":
    trl_python()
