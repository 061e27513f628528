# SPDX-License-Identifier: Apache-2.0
"""A teacher or reference that lives in a vLLM server: it says how likely tokens are, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_rl.policies.frozen import FrozenPolicy
from lit_rl.rollouts import Rollouts
from lit_rl.serving import Client, ServerGone, run

_PROBE = "Let 12 + 34 = x. Then\n x = 46; so f(x) = \\frac{x}{2}, or: 23?"
_TOKENS_ONLY = (
    "A served model gives log-probabilities of tokens only, and this method compares whole distributions: use a method "
    "or loss that needs logprobs.teacher (OPD with loss='policy_gradient'), or load the teacher with Checkpoint."
)


class Served(FrozenPolicy):
    """A model behind ``vllm serve`` (any server with ``prompt_logprobs``; it needs nothing of lit-rl).

    It scores the tokens that the policy sampled: enough for methods that use ``logprobs.teacher`` (OPD with
    ``loss="policy_gradient"``, G-OPD, KDRL, RLSD, RLAD) or ``logprobs.reference``. Divergences over the vocabulary need
    the model's hidden states, which a server does not give: those methods refuse it at set-up.

    Args:
        url: of the server.
        model: what the server calls the model; None: its only one.
        api_key: the server's key; None: the variable ``VLLM_API_KEY``.
        concurrency: completions that are scored at once.
        timeout: seconds until a single answer is given up.
        attempts: how often a completion is tried before the run ends.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        attempts: int = 3,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("attempts", attempts)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        self.client = Client(url, api_key or os.environ.get("VLLM_API_KEY"), timeout)
        self.name, self.concurrency, self.attempts = model, concurrency, attempts

    def score(
        self, live: nn.Module, rollouts: Rollouts, by: Callable[[Rollouts, nn.Module], Tensor], temperature: float
    ) -> Tensor:
        """``[N, T]``: the served model's log-probabilities of the completions, 0 outside of them.

        Raises:
            ValueError: the temperature is not 1, for which alone a server knows them.
            RuntimeError: the server does not answer.
        """
        if temperature != 1:
            raise ValueError(
                f"A server scores at temperature 1, but the policy samples at {temperature:g}: set "
                "sampling.temperature=1, or load the teacher with Checkpoint."
            )
        ids = rollouts.completions()
        rows = [(rollouts.prompts.ids[g].tolist(), own) for g, own in zip(rollouts.group.tolist(), ids)]
        found = run(self._score_all(rows))
        out = torch.zeros_like(rollouts.loss_weights)
        for i, values in enumerate(found):
            out[i, : len(values)] = torch.tensor(values, dtype=out.dtype, device=out.device)
        return torch.where(rollouts.kept_mask(), out, 0.0)

    async def _score_all(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        bound = asyncio.Semaphore(self.concurrency)
        async with self.client.session() as session:
            if self.name is None:
                self.name = (await self.client.get(session, "/v1/models"))["data"][0]["id"]
            return await asyncio.gather(*(self._score(session, bound, *row) for row in rows))

    async def _score(self, session: Any, bound: asyncio.Semaphore, prompt: list[int], ids: list[int]) -> list[float]:
        """Log-probabilities of the tokens ``ids`` after ``prompt``."""
        if not ids:
            return []
        body = {"model": self.name, "prompt": [*prompt, *ids], "max_tokens": 1, "prompt_logprobs": 0}
        async with bound:
            for attempt in range(1, self.attempts + 1):
                try:
                    answer = await self.client.post(session, "/v1/completions", body)
                    break
                except ServerGone as error:
                    if attempt == self.attempts:
                        raise RuntimeError(f"The served model did not score a completion: {error}") from error
                    await asyncio.sleep(attempt)
        entries = answer["choices"][0].get("prompt_logprobs")
        if not entries:
            raise RuntimeError(f"{self.client.url} returns no prompt_logprobs: it is no vLLM server, or an old one.")
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(ids, entries[len(prompt) :], strict=True)]

    def check_vocabulary(self, live: nn.Module, tokenizer: Any) -> None:
        """Raise ``ValueError`` if the server makes other tokens of a text than the policy's tokenizer."""
        mine = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        body = {"prompt": _PROBE, "add_special_tokens": False}

        async def ask() -> Any:
            async with self.client.session() as session:
                return await self.client.post(session, "/tokenize", body)

        theirs = run(ask())["tokens"]
        if list(mine) != list(theirs):
            raise ValueError(
                f"The model at {self.client.url} has another tokenizer than the policy ({_PROBE!r} is {theirs} there "
                f"and {mine} here). Probabilities of tokens can only be compared between models of one tokenizer: "
                "serve a model of the same family."
            )

    def require_states(self) -> None:
        raise ValueError(_TOKENS_ONLY)

    @contextmanager
    def model(self, live: nn.Module) -> Iterator[nn.Module]:
        raise ValueError(_TOKENS_ONLY)
        yield  # a context manager, as that of the others

    def identity(self) -> dict[str, Any]:
        return {"kind": "served", "url": self.client.url, "model": self.name}
