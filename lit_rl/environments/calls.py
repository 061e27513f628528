# SPDX-License-Identifier: Apache-2.0
"""Calls that may raise or hang, side by side in threads, each with its own deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lit_rl.rewards.pool import Outcome, call_here


def call_all(calls: Sequence[Callable[[], Any]], timeout: float, workers: int) -> list[Outcome]:
    """Run every call, at most ``workers`` at once; results in the same order.

    A call that takes longer than ``timeout`` seconds is given up: its outcome is a ``timeout``. Its thread cannot be
    killed; it goes on until it returns or the program ends (it does not keep the program alive).
    """
    outcomes = [Outcome(None, "timeout", f"it took longer than {timeout:g} s") for _ in calls]
    done: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()
    waiting, deadlines = deque(range(len(calls))), dict[int, float]()

    def run(i: int) -> None:
        done.put((i, call_here(calls[i], (), {})))

    while waiting or deadlines:
        while waiting and len(deadlines) < workers:
            i = waiting.popleft()
            deadlines[i] = time.monotonic() + timeout
            threading.Thread(target=run, args=(i,), daemon=True, name="environment").start()
        try:
            i, outcome = done.get(timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
        except queue.Empty:
            now = time.monotonic()
            deadlines = {i: t for i, t in deadlines.items() if t > now}
            continue
        if deadlines.pop(i, None) is not None:  # else it came back too late
            outcomes[i] = outcome
    return outcomes
