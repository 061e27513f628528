# SPDX-License-Identifier: Apache-2.0
"""Run a function in other processes: on several CPU ranks that talk through gloo, or alone, to be signalled or killed.

Processes are forked from a server that has imported the package once, so that starting one takes milliseconds and no
thread of the caller is inherited.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PRELOADED = ["lit_rl.testing", "transformers.models.qwen2.modeling_qwen2"]


def run_on_ranks(function: Callable[..., None], ranks: int = 2, *args: Any) -> None:
    """Call ``function(rank, *args)`` in ``ranks`` processes with a process group; any exception fails the call.

    Args:
        function: importable by name (it is pickled).
        ranks: number of processes.
        args: further arguments.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    arguments = (function, ranks, free_port(), args)
    mp.start_processes(_enter, args=arguments, nprocs=ranks, join=True, start_method="forkserver")


def free_port() -> int:
    """A TCP port on this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(rank: int, function: Callable[..., None], ranks: int, port: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_process(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Call ``function(*args)`` in a process of its own, with as many threads as this one, and return at once.

    The process has ``pid`` (to signal it), ``join(timeout)`` and ``exitcode`` (negative: the signal that killed it).

    Args:
        function: importable by name (it is pickled).
        args: its arguments.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_alone, args=(function, torch.get_num_threads(), args))
    process.start()
    return process


def _alone(function: Callable[..., None], threads: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    function(*args)
