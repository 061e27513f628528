# SPDX-License-Identifier: Apache-2.0
"""A completion in vLLM's terms: what to ask the engine or its server for, and what comes back."""

from __future__ import annotations

from typing import Any

from lit_rl.samplers.base import Sampling
from lit_rl.samplers.external import Order


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """The settings in vLLM's names, for `SamplingParams` and for its server alike.

    vLLM restricts the support in the order min-p, top-k, top-p, lit-rl's own sampler in the order top-k, top-p, min-p.
    The two differ where min-p is combined with top-p.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "logprobs": 0,  # of the token that was drawn
    }


def completion_body(model: str, order: Order, sampling: Sampling, stop_token_ids: set[int], stream: bool) -> Any:
    """The body of a request to ``/v1/completions``, token ids in and out."""
    return {
        "model": model,
        "prompt": order.context,
        **sampling_arguments(sampling),
        "seed": order.seed,
        "max_tokens": order.budget,
        "stop": [s for s in sampling.stop if s] or None,
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": True,  # what ends a completion is in stop_token_ids
        "skip_special_tokens": False,
        "return_token_ids": True,
        "stream": stream,
    }


def drawn_tokens(choice: Any) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of an answer's choice, or of a piece of it."""
    tokens = list(choice.get("token_ids") or ())
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(logprobs) != len(tokens):
        raise ValueError(
            f"The server returned {len(tokens)} token ids and {len(logprobs)} log-probabilities: lit-rl needs a vLLM "
            "server that knows return_token_ids."
        )
    return tokens, [float(x) for x in logprobs]
