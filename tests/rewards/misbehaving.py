# SPDX-License-Identifier: Apache-2.0
"""Verifiers that fail in every way, importable by worker processes (which need no torch for them)."""

import os
import re
import signal
import sys
import time
from typing import Any


def verify(completion: str, **columns: Any) -> Any:
    """Fails as the completion says; otherwise 1 for the answer 42."""
    if completion == "raise":
        raise ZeroDivisionError("no such thing")
    if completion == "raise timeout":
        raise TimeoutError("a service did not answer")
    if completion == "exit":
        sys.exit(3)
    if completion == "hang":
        while True:
            pass
    if completion == "hang in C":
        re.match(r"(a|a)*$", "a" * 60 + "b")
    if completion == "sleep":
        time.sleep(60)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "unpicklable":
        return lambda: None
    special = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "nonsense"}
    return special[completion] if completion in special else float(completion == "42")


def process_id(completion: str) -> int:
    return os.getpid()


def batch_pause(batch: Any) -> list[float]:
    """Whole-batch function: takes as many seconds as the first completion says, then gives the lengths."""
    time.sleep(float(batch.completions[0]))
    return [float(length) for length in batch.lengths]


class DiesOnImport:
    """Kills any process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)

    def __call__(self, completion: str) -> float:
        return 1.0
