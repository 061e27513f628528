# SPDX-License-Identifier: Apache-2.0
"""Run a function on several CPU processes that talk through gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., None], ranks: int = 2, *args: Any) -> None:
    """Call ``function(rank, *args)`` in ``ranks`` processes with a process group; any exception fails the call.

    Args:
        function: importable by name (it is pickled).
        ranks: number of processes.
        args: further arguments.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, args=(function, ranks, port, args), nprocs=ranks, join=True)


def _enter(rank: int, function: Callable[..., None], ranks: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
