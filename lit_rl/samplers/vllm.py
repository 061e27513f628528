# SPDX-License-Identifier: Apache-2.0
"""Sampling with a vLLM engine in the trainer's process: `VLLMSampler`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lit_rl.objectives import OffPolicyCorrection
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutRequest, RolloutSampler
from lit_rl.samplers.external import Agreement, Ends, ExternalRows
from lit_rl.samplers.vllm_engine import Engine, left_alone, require_vllm

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule

_log = logging.getLogger(__name__)


class VLLMSampler(RolloutSampler):
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
        if max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, got {max_restarts}.")
        self.options = dict(engine or {})
        self.loss_correction = OffPolicyCorrection("token", weight_high=max_weight)
        self.agreement = Agreement(check_every, tolerance)
        self.max_restarts, self.restarts = max_restarts, 0
        self.engine: Engine | None = None
        self._pending: deque[RolloutRequest] = deque()
        self._current = False  # whether the engine has the policy's weights
        self._worked = False  # whether an engine ever drew a token: then a failure may be passing
        self._sync_seconds = 0.0

    def check_setup(self, module: RLModule) -> None:
        """Refuse what an engine beside the trainer cannot share."""
        if module.trainer.world_size > 1:
            raise ValueError(
                "VLLMSampler runs one engine in one training process. With several ranks let each have HFSampler, or "
                "use a vLLM server (VLLMServerSampler) or RaySampler."
            )

    def submit(self, request: RolloutRequest) -> None:
        """Keep the request for `collect`, which does the work."""
        self._pending.append(request)

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """The policy has new weights: the engine takes them before it samples again, when it is awake."""
        super().sync(model, version)
        self._current = False

    def collect(self) -> Rollouts:
        """Generate the completions of the oldest request.

        Raises:
            ValueError: a prompt is empty, or longer with its budget than the engine's ``max_model_len``.
            RuntimeError: the engine failed more than ``max_restarts`` times, or before it had drawn any token.
            DisagreementError: its log-probabilities are not the policy's.
        """
        if not self._pending:
            raise RuntimeError("VLLMSampler has nothing to collect: submit a request first.")
        request = self._pending.popleft()
        engine = self._ready()
        ends = Ends(self.model, self.tokenizer, request.sampling)
        rows = ExternalRows(request, ends, engine.max_positions)
        while True:
            try:
                with left_alone():
                    self._generate(self._ready(), rows)
                break
            except Exception as error:
                if not self._worked:
                    raise
                self._bury(error)
                rows.forget()
        out = rows.rollouts(self.policy_version)
        self.agreement.check(self.model, out, request.sampling, self.policy_version, type(self).__name__)
        return out.to(next(self.model.parameters()).device)

    def _ready(self) -> Engine:
        """The engine, with the policy's current weights."""
        if self.engine is None:
            self.engine, self._current = Engine(self.model, self.options), False
        if not self._current:
            began = time.perf_counter()
            self.engine.load(self.model)
            self._sync_seconds = time.perf_counter() - began
            self._current = True
            self.agreement.synced()
        return self.engine

    def _generate(self, engine: Engine, rows: ExternalRows) -> None:
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

    def _bury(self, error: Exception) -> None:
        """The engine failed: the next one begins anew, unless this was too often."""
        self.restarts += 1
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        if self.restarts > self.max_restarts:
            raise RuntimeError(
                f"The vLLM engine failed {self.restarts} times (max_restarts={self.max_restarts}), the last time with "
                f"{type(error).__name__}: {error}. Look above for vLLM's own messages; memory is the usual cause: "
                "lower gpu_memory_utilization or max_num_seqs in `engine`."
            ) from error
        _log.warning("The vLLM engine failed (%s: %s) and is built anew.", type(error).__name__, error)

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

    def on_rewind(self, model: torch.nn.Module) -> None:
        """Forget requests that were not collected."""
        self._pending.clear()

    def return_to(self, boundary: Any) -> None:
        self._pending.clear()

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Seconds of the last weight update, restarts, and the difference that the last comparison found."""
        numbers = {"sync_seconds": self._sync_seconds, "restarts": float(self.restarts)}
        return numbers | ({} if self.agreement.gap is None else {"logprob_gap": self.agreement.gap})

    def describe(self) -> str:
        """One line for the run header."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"VLLMSampler(check_every={self.agreement.every}{options})"

    def close(self) -> None:
        """Release the engine."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
