# SPDX-License-Identifier: Apache-2.0
"""A small policy on which a sampler can be tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rl.policies import Policy
from lit_rl.policies.scoring import evaluation_mode
from lit_rl.rollouts import Prompts, Rollouts, occurrence
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling
from lit_rl.testing.toys import make_policy

GROUP = [2, 0, 0, 2, 0, 2, 3, 2, 2, 0, 3, 3]  # groups of 4, 0, 5 and 3 rows, mixed


class SamplerBench:
    """A sampler on a small policy, and requests to try it with.

    Args:
        factory: builds the sampler.
        folder: where the policy is written; one that is there is used.
        tolerance: largest difference of a log-probability, in nats.
        max_tokens: budget of a completion.
    """

    def __init__(
        self,
        factory: Callable[[], RolloutSampler],
        folder: Path | str,
        tolerance: float = 1e-4,
        max_tokens: int = 24,
    ) -> None:
        # Weights so large that the distributions are neither flat nor nearly deterministic.
        path = make_policy(Path(folder) / "policy", initializer_range=0.25, max_position_embeddings=128)
        self.model, self.tokenizer = Policy(str(path)).load()
        self.factory, self.tolerance, self.max_tokens = factory, tolerance, max_tokens
        # Each of these ends a completion, so that rows end at different steps and for different reasons.
        self.ends = self.tokenizer.convert_tokens_to_ids(list("0123"))
        self.version = 0
        self.sampler = self._build()

    def _build(self) -> RolloutSampler:
        sampler = self.factory()
        sampler.setup(self.model, self.tokenizer)
        sampler.sync(self.model, self.version)
        return sampler

    def restart(self) -> RolloutSampler:
        """Close the sampler and build another, as a resumed run does."""
        self.sampler.close()
        self.sampler = self._build()
        return self.sampler

    def __enter__(self) -> SamplerBench:
        return self

    def __exit__(self, *error: object) -> None:
        self.sampler.close()

    def prompts(self, first: int = 0, count: int = 4) -> Prompts:
        """Prompts of different lengths, drawn at positions ``first``, ``first + 1``, … of a stream."""
        draws = range(first, first + count)
        texts = [("7+2=", "12+345=", "1", "86+7+51=")[d % 4] + str(d) * (d >= 4) for d in draws]
        return Prompts(
            ids=[torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts],
            text=texts,
            uid=torch.tensor([1000 + d for d in draws], dtype=torch.long),
            draw=torch.tensor(list(draws), dtype=torch.long),
            source=["bench"] * count,
            columns={"answer": [str(d) for d in draws]},
        )

    def request(self, group: Sequence[int] = GROUP, seed: int = 5, **changes: Any) -> RolloutRequest:
        """A request with rows of the given groups; ``changes`` are of the request or of its sampling settings."""
        names = vars(Sampling())
        defaults = {"max_tokens": self.max_tokens, "stop_token_ids": self.ends}
        sampling = Sampling(**defaults | {k: v for k, v in changes.items() if k in names})
        rest = {k: v for k, v in changes.items() if k not in names}
        rows = torch.tensor(group, dtype=torch.long)
        return RolloutRequest(self.prompts(), rows, occurrence(rows), sampling, seed, **rest)

    def sample(self, request: RolloutRequest | None = None, **changes: Any) -> Rollouts:
        """The completions of a request (or of `request` with ``changes``), on the CPU."""
        with self.sampler.active():
            return self.sampler.sample(self.request(**changes) if request is None else request).to("cpu")

    @torch.no_grad()
    def logits(self, rollouts: Rollouts) -> list[Tensor]:
        """For each row ``[length, V]``: the logits behind its tokens, by one plain forward over the whole row."""
        out = []
        with evaluation_mode(self.model):
            for row, group in enumerate(rollouts.group.tolist()):
                prompt, n = rollouts.prompts.ids[group], int(rollouts.lengths[row])
                ids = torch.cat([prompt, rollouts.completion_ids[row, :n]]).to(self.model.device)
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
                out.append(logits[len(prompt) - 1 : len(prompt) - 1 + n].float().cpu())
        return out

    def assert_same(self, first: Rollouts, second: Rollouts) -> None:
        """Fail unless two batches hold the same tokens and ends, and log-probabilities within the tolerance."""
        width = max(first.width, second.width)
        first, second = first.pad(width), second.pad(width)
        for name in ("lengths", "stop_reason", "finished"):
            assert torch.equal(first.row[name], second.row[name]), f"{name} differ: {_both(first, second, name)}"
        where = torch.arange(width) < first.lengths[:, None]
        differ = (where & (first.completion_ids != second.completion_ids)).any(1).nonzero()[:, 0].tolist()
        assert not differ, f"the tokens of rows {differ} differ"
        gap = torch.where(where, first.logprobs["sampler"] - second.logprobs["sampler"], 0.0).abs()
        assert float(gap.amax() if gap.numel() else 0) <= self.tolerance, "log-probabilities differ"


def _both(first: Rollouts, second: Rollouts, name: str) -> str:
    return f"{first.row[name].tolist()} and {second.row[name].tolist()}"
