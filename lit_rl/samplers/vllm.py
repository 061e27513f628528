# SPDX-License-Identifier: Apache-2.0
"""Sampling with a vLLM engine in the trainer's process: `VLLMSampler`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lit_rl.samplers.base import RolloutRequest
from lit_rl.samplers.external import ExternalRows, ExternalSampler
from lit_rl.samplers.vllm_engine import Engine, left_alone, require_vllm

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule


class VLLMSampler(ExternalSampler):
    """Decodes with vLLM, which holds a copy of the policy in the trainer's process and on its device.

    After each update the copy takes the policy's weights (LoRA adapters merged on the way). Between rollouts it sleeps
    where vLLM can (CUDA), so that the trainer has the memory. Tokens come from one seed a completion, so a run is
    repeatable; another batch gives the same completions up to the rounding of the logits.

    vLLM computes with other kernels than the trainer. The log-probabilities it returns are therefore never taken for
    the trainer's own, the difference is logged (``policy/kl_sampler``), and the loss weighs each token with the bounded
    ratio of the two, unless the method sets its own ``correction``.

    Args:
        engine: arguments of ``vllm.LLM``, such as ``max_model_len``, ``gpu_memory_utilization`` (default here 0.3) or
            ``max_num_seqs``. On a CPU the size of its cache in GiB is the variable ``VLLM_CPU_KVCACHE_SPACE``.
        max_weight: bound of the ratio in the loss.
        check_every: compare the engine's log-probabilities with the policy's after the first and every so many updates
            (0: never).
        tolerance: largest mean difference in nats a token; None: 1e-3 for a policy in float32, else 0.1.
        max_restarts: how often in a run a failed engine is built anew. What it had not finished is sampled again, from
            the same seeds.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        engine: Mapping[str, Any] | None = None,
        max_weight: float = 2.0,
        check_every: int = 50,
        tolerance: float | None = None,
        max_restarts: int = 3,
    ) -> None:
        require_vllm(type(self).__name__)
        super().__init__(max_weight, check_every, tolerance, max_restarts)
        self.options = dict(engine or {})
        self.engine: Engine | None = None
        self._current = False  # whether the engine has the policy's weights
        self._worked = False  # whether an engine ever drew a token: then a failure may be passing

    def check_setup(self, module: RLModule) -> None:
        """Refuse what an engine beside the trainer cannot share."""
        if module.trainer.world_size > 1:
            raise ValueError(
                "VLLMSampler runs one engine in one training process. With several ranks let each have HFSampler, or "
                "use a vLLM server (VLLMServerSampler) or RaySampler."
            )

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """The policy has new weights: the engine takes them before it samples again, when it is awake."""
        super().sync(model, version)
        self._current = False

    def generate(self, request: RolloutRequest) -> ExternalRows:
        """The rows of a request; a failure of the engine before it has drawn any token is raised as it is."""
        rows = self.rows_of(request, self._ready().max_positions)
        while True:
            try:
                with left_alone():
                    self._run(self._ready(), rows)
                return rows
            except Exception as error:
                if not self._worked:
                    raise
                self._end_engine()
                hint = "Memory is the usual cause: lower gpu_memory_utilization or max_num_seqs in `engine`."
                self.count_failure(error, "The vLLM engine", hint)
                rows.forget()

    def _ready(self) -> Engine:
        """The engine, with the policy's current weights."""
        if self.engine is None:
            self.engine, self._current = Engine(self.model, self.options), False
        if not self._current:
            began = time.perf_counter()
            self.engine.load(self.model)
            self.sync_seconds = time.perf_counter() - began
            self._current = True
            self.agreement.synced()
        return self.engine

    def _run(self, engine: Engine, rows: ExternalRows) -> None:
        """Run the engine until every row has ended, or the request asks to stop."""
        sampling = rows.request.sampling
        for order in rows.orders():
            engine.start(order, sampling, rows.ends.token_ids)
        while engine.busy:
            drawn = engine.step()
            self._worked |= bool(drawn)
            done = {d.row for d in drawn if rows.add(d.row, d.tokens, d.logprobs) and not d.ended}
            engine.abort(done)  # it knows nothing of stop strings
            if rows.interrupted():
                engine.abort()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the engine is awake."""
        if self.engine is not None:
            self.engine.wake()
        try:
            yield
        finally:
            if self.engine is not None:
                self.engine.sleep()

    def describe(self) -> str:
        """One line for the run header."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"VLLMSampler(check_every={self.agreement.every}{options})"

    def close(self) -> None:
        """Release the engine."""
        self._end_engine()

    def _end_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None
