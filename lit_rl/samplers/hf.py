# SPDX-License-Identifier: Apache-2.0
"""Sampling in the trainer's process with the trainer's own weights: `HFSampler`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.decode_loop import DecodeLoop
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.support import processed_logprobs

if TYPE_CHECKING:
    from lit_rl.samplers.decoder import ModelDecoder

_log = logging.getLogger(__name__)


class HFSampler(RolloutSampler):
    """Decodes with a transformers causal language model that it shares with the trainer.

    Each prompt is computed once for its whole group, finished rows leave the batch, and log-probabilities and entropies
    come from the logits that were sampled from. A token's noise is a hash of (seed, draw, sample, position), so a row
    comes out the same alone, in any batch, and continued after an interruption (up to the rounding of the logits).

    Ids beyond the tokenizer's vocabulary (padding rows of the head) are never drawn; log-probabilities are nevertheless
    over the whole head, as the trainer computes them.

    Args:
        max_rows: completions decoded at once; more are done in waves.
        prefill_tokens: padded prompt tokens of one prefill forward.
        fallback: what to do with a model that keeps more than keys and values (recurrent states, hybrids): ``"warn"``
            decodes it in a slower way, ``"error"`` raises. All promises above hold either way.
    """

    in_process = True
    provides = frozenset({"logprobs.sampler", "entropy"})

    def __init__(
        self, max_rows: int = 256, prefill_tokens: int = 16384, fallback: Literal["warn", "error"] = "warn"
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {prefill_tokens}.")
        if fallback not in ("warn", "error"):
            raise ValueError(f"fallback must be 'warn' or 'error', got {fallback!r}.")
        self.max_rows, self.prefill_tokens, self.fallback = max_rows, prefill_tokens, fallback
        self.decoder: ModelDecoder | None = None
        self._stopping: dict[tuple[Any, ...], Stopping] = {}
        self._pending: deque[RolloutRequest] = deque()

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Find out how to decode with this model; ``ValueError`` if there is no way, or only a slow one not wanted."""
        super().setup(model, tokenizer)
        self._stopping.clear()
        unwrap = getattr(model, "get_base_model", None)  # PEFT
        causal: Any = unwrap() if callable(unwrap) else model
        name = type(causal).__name__
        if not hasattr(getattr(causal, "config", None), "get_text_config"):
            raise ValueError(f"HFSampler needs a transformers causal language model, got {name}; use another sampler.")
        if getattr(causal.config, "is_encoder_decoder", False):
            raise ValueError(f"HFSampler needs a decoder-only model and {name} is an encoder-decoder; choose another.")
        self.decoder, problem = self._choose_decoder(causal)
        if self.decoder is None:
            raise ValueError(f"HFSampler cannot decode with {name}: {problem}. Use another sampler.")
        if problem is not None and self.fallback == "error":
            raise ValueError(f"HFSampler has only a slow way for {name}: {problem}. Set fallback='warn' to accept it.")
        if problem is not None:
            kind = type(self.decoder).__name__
            _log.warning("HFSampler decodes %s in a slow way (%s): %s.", name, kind, problem)

    def _choose_decoder(self, causal: Any) -> tuple[ModelDecoder | None, str | None]:
        """The first decoder that agrees with the model, and what spoke against the normal ones."""
        from lit_rl.samplers.decoder import ModelDecoder, decoding, mismatch, unsupported
        from lit_rl.samplers.fast_decode import FastDecoder, has_fast_step
        from lit_rl.samplers.slow_decode import NativeCacheDecoder, RecomputeDecoder

        problem = unsupported(causal)
        kinds: list[type[ModelDecoder]] = [NativeCacheDecoder, RecomputeDecoder]
        if problem is None:
            kinds = [ModelDecoder, *kinds]
            if has_fast_step(causal):
                kinds = [FastDecoder, *kinds]
        for kind in kinds:
            decoder = kind(causal, self.prefill_tokens)
            try:
                with decoding(causal):
                    found = mismatch(decoder)
            except Exception as error:  # whatever it is, this way is closed
                found = f"a trial of {kind.__name__} failed with {type(error).__name__}: {error}"
            if found is None:
                fresh = kind(causal, self.prefill_tokens)  # without the trial's cache and weights
                fresh.vocab_size = decoder.vocab_size
                return fresh, problem
            _log.debug("HFSampler: %s does not suit %s: %s", kind.__name__, type(causal).__name__, found)
            if kind is not FastDecoder:
                problem = problem or found
        return None, problem

    def submit(self, request: RolloutRequest) -> None:
        """Keep the request for `collect`, which does the work."""
        if self.decoder is None:
            raise RuntimeError("HFSampler has no model yet: call setup(model, tokenizer) before submit().")
        self._pending.append(request)

    def collect(self) -> Rollouts:
        """Generate the completions of the oldest request; all tensors on the model's device.

        Raises:
            ValueError: a prompt is empty, or prompt and budget are longer than the positions that the model has.
        """
        from lit_rl.samplers.decoder import decoding

        if not self._pending or self.decoder is None:
            raise RuntimeError("HFSampler has nothing to collect: submit a request first.")
        request = self._pending.popleft()
        # The loop works on a copy, so that its cache is freed with it.
        loop = DecodeLoop(request, copy(self.decoder), self._stopping_for(request.sampling))
        loop.check()
        with decoding(self.model):
            loop.generate(self.max_rows)
        return loop.rollouts(self.policy_version)

    def next_token_logprobs(self, contexts: Sequence[Tensor], sampling: Sampling) -> Tensor:
        """``[n, V]``: the distribution after each context, on the model's device."""
        from lit_rl.samplers.decoder import decoding

        if self.decoder is None:
            raise RuntimeError("HFSampler has no model yet: call setup(model, tokenizer) first.")
        with decoding(self.model):
            logits = copy(self.decoder).start(contexts, torch.arange(len(contexts), device=self.decoder.device), 1)
            return processed_logprobs(logits, sampling)

    def _stopping_for(self, sampling: Sampling) -> Stopping:
        assert self.decoder is not None
        key = (tuple(sampling.stop), tuple(sampling.stop_token_ids))
        if key not in self._stopping:  # reading a large vocabulary takes about a second
            decoder = self.decoder
            self._stopping[key] = Stopping(
                decoder.model, self.tokenizer, sampling, vocab_size=decoder.vocab_size, device=decoder.device
            )
        return self._stopping[key]

    def on_rewind(self, model: torch.nn.Module) -> None:
        """Forget requests that were not collected."""
        self._pending.clear()

    def describe(self) -> str:
        """One line for the run header."""
        how = f", {type(self.decoder).__name__}" if self.decoder is not None else ""
        return f"HFSampler(max_rows={self.max_rows}{how})"
