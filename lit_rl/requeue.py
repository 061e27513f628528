# SPDX-License-Identifier: Apache-2.0
"""SLURM tells a job that its time is nearly over; the run stops between two steps, and the job is queued again.

Lightning would save in the signal's handler, in the middle of a step, a state from which no run resumes exactly.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal that announces the end of a SLURM job that shall be queued again; None outside of such a job."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    wanted = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return int(environment.requeue_signal) if wanted and environment.requeue_signal else None


def requeue() -> bool:
    """Queue the present job again; whether SLURM took it. The job's own command must say ``--ckpt_path last``."""
    array, task = os.getenv("SLURM_ARRAY_JOB_ID"), os.getenv("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        rank_zero_warn(f"SLURM did not queue job {job} again ({reason}): submit it yourself, with --ckpt_path last.")
        return False
    rank_zero_info(f"Queued SLURM job {job} again.")
    return True
