# SPDX-License-Identifier: Apache-2.0
"""Explore cheap, train exact: a large pool of cheap completions is scored, and only its extremes are made for real.

After Sol-RL (arXiv 2604.06916), which explores in FP4 and trains in BF16. The paper is about diffusion, where a noise
seed fixes the outcome; its three translations to text here are a RECONSTRUCTION.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.noise import row_keys, uniforms
from lit_rl.samplers.selection import Selection, contrast, select_from_pool
from lit_rl.samplers.stopping import Stopping
from lit_rl.samplers.verifying import accept_prefixes
from lit_rl.samplers.wrapping import SamplerWrapper, is_open, replace_rows
from lit_rl.seeding import mix_seeds

Regeneration = Literal["coupled", "verified", "fresh"]


class TwoStageSampler(SamplerWrapper):
    """Explores with one sampler, and trains only on completions of another, exact one.

    Each prompt gets a pool of ``pool_size`` completions from ``explore``, which the method's own rewards score. The
    prompts with the most contrast are kept (``oversampling``), and of each pool as many completions as the group size:
    the best and the worst. What is returned comes from ``exploit``:

    - ``"coupled"``: the kept completions are sampled again with the same Gumbel noise. Where the two policies agree
      the text is the same; after the first difference it goes its own way.
    - ``"verified"``: their tokens are accepted one by one with probability min(1, p / q), the first rejected one is
      drawn from the rest, and the text is continued (speculative sampling): exact samples that keep long beginnings of
      the explored text.
    - ``"fresh"``: only the choice of prompts is kept; completions are new. It needs ``oversampling`` > 1. The only mode
      in which the trained completions are not biased by the selection.

    Rewards of the pool never train: returned completions are scored again. In the first two modes the group is selected
    by reward, so its mean reward says nothing about the pass rate; the row signal ``explore_reward`` has the reward of
    the explored completion. Requests that are not part of a training step go to ``exploit``.

    Args:
        explore: cheap sampler, such as `LowPrecisionSampler`.
        exploit: exact sampler. Default `HFSampler`.
        pool_size: completions explored for each prompt, at least the group size (the authors: 96 for 24).
        mode: how kept completions become exact ones.
        selection: which completions of a pool are kept; see `select_from_pool`.
        oversampling: explore this many times the prompts that a step needs.

    Raises:
        ValueError: an argument is out of range, or a sampler lacks what the mode needs.
    """

    selects = True

    def __init__(
        self,
        explore: RolloutSampler,
        exploit: RolloutSampler | None = None,
        pool_size: int = 32,
        mode: Regeneration = "coupled",
        selection: Selection = "best_worst",
        oversampling: float = 1.0,
    ) -> None:
        super().__init__(exploit or HFSampler())
        if explore.carries_over or explore.selects:
            raise ValueError(
                f"TwoStageSampler needs explored completions now: {type(explore).__name__} cannot explore."
            )
        if pool_size < 1:
            raise ValueError(f"pool_size must be at least 1, got {pool_size}.")
        if mode not in get_args(Regeneration):
            raise ValueError(f"mode must be 'coupled', 'verified' or 'fresh', got {mode!r}.")
        if selection not in get_args(Selection):
            raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}, got {selection!r}.")
        if not oversampling >= 1:
            raise ValueError(f"oversampling must be at least 1, got {oversampling}.")
        if mode == "fresh" and oversampling == 1:
            raise ValueError("mode='fresh' keeps nothing but the choice of prompts: set oversampling above 1.")
        continued = self.inner.continues_prefix and explore.continues_prefix
        if mode == "verified" and not (self.inner.in_process and continued):
            raise ValueError(
                f"mode='verified' scores text of {type(explore).__name__} token by token with the trainer's weights, "
                f"continues it with {type(self.inner).__name__}, and one of the two does not allow that: use HFSampler "
                "as `exploit` and a sampler without an environment as `explore`, or another mode."
            )
        self.explore, self.exploit = explore, self.inner
        self.pool_size, self.mode, self.selection, self.oversampling = pool_size, mode, selection, oversampling
        self._stopping: dict[tuple[Any, ...], Stopping] = {}
        self._numbers = _Numbers()

    # Both samplers -------------------------------------------------------------------------------------------------

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        self.explore.setup(model, tokenizer)
        self._stopping.clear()

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        self.explore.check_setup(module)
        if not module.rewards:
            raise ValueError("TwoStageSampler selects by reward and the method has none: set `rewards`.")
        if module.group_size > self.pool_size:
            raise ValueError(
                f"TwoStageSampler keeps group_size={module.group_size} of pool_size={self.pool_size} completions: "
                "raise pool_size."
            )

    def sync(self, model: torch.nn.Module, version: int) -> None:
        super().sync(model, version)
        self.explore.sync(model, version)

    def on_rewind(self, model: torch.nn.Module) -> None:
        super().on_rewind(model)
        self.explore.on_rewind(model)

    def boundary(self) -> Any:
        return super().boundary(), self.explore.boundary()

    def return_to(self, boundary: Any) -> None:
        super().return_to(boundary[0])
        self.explore.return_to(boundary[1])

    @contextmanager
    def active(self) -> Iterator[None]:
        """Each sampler owns the memory in its own stage only."""
        yield

    def state_dict(self) -> dict[str, Any]:
        state = self.explore.state_dict()
        return super().state_dict() | ({"explore": state} if state else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "explore" in state:
            self.explore.load_state_dict(state["explore"])

    def describe(self) -> str:
        pool = f"{self.pool_size} by {self.explore.describe()}"
        return f"TwoStageSampler({pool}, {self.selection} by {self.exploit.describe()}, {self.mode})"

    def close(self) -> None:
        super().close()
        self.explore.close()

    # A step --------------------------------------------------------------------------------------------------------

    def prompts_to_draw(self, wanted: int) -> int:
        return math.ceil(self.oversampling * wanted - 1e-9)

    def generate(self, request: RolloutRequest) -> Rollouts:
        """Explore, select, regenerate."""
        if request.wanted is None or not len(request):
            with self.exploit.active():
                return self.exploit.sample(replace(request, wanted=None))
        if request.score is None:
            raise ValueError("TwoStageSampler selects by reward: the request must bring `score`.")
        if request.prefix is not None:
            raise ValueError("TwoStageSampler explores whole completions and cannot continue a prefix.")
        began = time.perf_counter()
        pool = self._explored(request)
        if bool(is_open(pool).any()):
            return pool  # the run is being stopped
        kept = self._kept(pool, request)
        explored = time.perf_counter()
        with self.exploit.active():
            out = self._regenerated(kept, request).to("cpu")
        self._numbers.time(explored - began, time.perf_counter() - explored)
        self._numbers.pool(pool, kept)
        if self.mode != "fresh":
            self._numbers.kept_tokens(kept, out)
            out.row["explore_reward"] = kept.rewards.float()
        return out.trim()

    def _explored(self, request: RolloutRequest) -> Rollouts:
        """``pool_size`` scored completions of each prompt."""
        count = len(request.prompts)
        group = torch.arange(count).repeat_interleave(self.pool_size)
        budgets = prompt_budgets(request)[group]
        ask = replace(
            request,
            group=group,
            sample=torch.arange(self.pool_size).repeat(count),
            budgets=budgets,
            score=None,
            wanted=None,
            noise="gumbel" if self.mode == "coupled" else request.noise,
            entropy=False,
        )
        with self.explore.active():
            pool = self.explore.sample(ask).to("cpu")
        pool.row["budget"] = budgets
        assert request.score is not None
        return pool if bool(is_open(pool).any()) else request.score(pool).to("cpu")

    def _kept(self, pool: Rollouts, request: RolloutRequest) -> Rollouts:
        """The rows of the pool that are regenerated: of the prompts with most contrast, as many as were requested."""
        spread = contrast(pool.rewards, pool.group, len(pool.prompts))
        best = spread.argsort(descending=True, stable=True)[: request.wanted].sort().values.tolist()
        sizes = torch.bincount(request.group, minlength=len(pool.prompts)).tolist()
        keys = row_keys(mix_seeds(request.seed, "selection"), pool.prompts.draw[pool.group], pool.row["sample"])
        noise = uniforms(keys, torch.zeros_like(keys))
        rows: list[Tensor] = []
        for g in best:
            members = (pool.group == g).nonzero()[:, 0]
            rows.append(members[select_from_pool(pool.rewards[members], sizes[g], self.selection, noise[members])])
        return pool.select(torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long))

    def _regenerated(self, kept: Rollouts, request: RolloutRequest) -> Rollouts:
        """Exact completions for the kept rows, in their order."""
        ask = replace(
            request,
            prompts=kept.prompts,
            group=kept.group,
            sample=kept.row["sample"],
            budgets=kept.row["budget"],
            score=None,
            wanted=None,
        )
        if self.mode == "coupled":
            return self.exploit.sample(replace(ask, noise="gumbel"))
        ask.seed = mix_seeds(request.seed, "exploit")  # what comes now must not depend on what was selected by
        if self.mode == "fresh":
            return self.exploit.sample(ask)
        return self._verified(kept, ask)

    def _verified(self, kept: Rollouts, ask: RolloutRequest) -> Rollouts:
        if not ask.sampling.full_support:
            raise ValueError(
                "mode='verified' needs every token to have a probability: set top_p=1, top_k=0, min_p=0 and a "
                "temperature above 0, or use mode='coupled'."
            )
        drafts = replace(kept, row={k: v for k, v in kept.row.items() if not k.startswith("reward_")}, edits=[])
        stopping = self._stopping_for(ask.sampling)
        out = accept_prefixes(
            drafts, self.model, self.exploit, self.explore, ask.sampling, stopping, ask.seed, ask.entropy
        )
        accepted = out.row.pop("accepted")
        rows = is_open(out)
        if bool(rows.any()):
            part = out.select(rows)
            names: dict[str, Any] = {"prompts": part.prompts, "group": part.group, "sample": part.row["sample"]}
            more = self.exploit.sample(replace(ask, prefix=part, budgets=part.row["budget"], **names))
            out = replace_rows(out, rows, more.to("cpu"))
        del out.row["budget"]
        self._numbers.accepted(accepted, kept)
        out.correct = torch.full_like(out.correct, math.nan)
        return out

    def _stopping_for(self, sampling: Sampling) -> Stopping:
        key = (tuple(sampling.stop), tuple(sampling.stop_token_ids))
        if key not in self._stopping:
            size = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
            self._stopping[key] = Stopping(self.model, self.tokenizer, sampling, vocab_size=size, device="cpu")
        return self._stopping[key]

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Contrast, what of the explored text came back, agreement of both rewards, seconds of each stage."""
        numbers, self._numbers = self._numbers.summary(rollouts), _Numbers()
        return numbers | self.explore.metrics(rollouts) | super().metrics(rollouts)


def prompt_budgets(request: RolloutRequest) -> Tensor:
    """``[B]``: the most tokens that any completion of a prompt may have."""
    limit = torch.full((len(request.prompts),), request.sampling.max_tokens)
    if request.budgets is None:
        return limit
    return limit.scatter_reduce(0, request.group, request.budgets.to(limit), "amax", include_self=False)


class _Numbers:
    """What happened in a step, over all its rounds."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Let finite values count in the mean that is reported as ``name``."""
        values = values[values.isfinite()].double()
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.sum())
        total[1] += len(values)

    def time(self, explore: float, exploit: float) -> None:
        for name, seconds in (("explore_seconds", explore), ("exploit_seconds", exploit)):
            self.sums.setdefault(name, [0.0, 1.0])[0] += seconds

    def pool(self, pool: Rollouts, kept: Rollouts) -> None:
        self.add("pool_reward_mean", pool.rewards)
        self.add("pool_contrast", contrast(pool.rewards, pool.group, len(pool.prompts)))
        self.add("kept_contrast", contrast(kept.rewards, kept.group, len(kept.prompts)))

    def kept_tokens(self, kept: Rollouts, out: Rollouts) -> None:
        """Share of the explored tokens that come back unchanged, counted up to the first difference."""
        width = max(kept.width, out.width)
        ids = [x.pad(width).completion_ids for x in (kept, out)]
        shorter = torch.minimum(kept.lengths, out.lengths)
        same = (ids[0] == ids[1]) & (torch.arange(width) < shorter[:, None])
        self.add("kept_prefix_ratio", same.cumprod(1).sum(1) / kept.lengths.clamp(min=1))

    def accepted(self, accepted: Tensor, kept: Rollouts) -> None:
        total = self.sums.setdefault("accepted_ratio", [0.0, 0.0])
        total[0] += float(accepted.sum())
        total[1] += float(kept.lengths.sum())

    def summary(self, rollouts: Rollouts) -> dict[str, float]:
        numbers = {name: total / count for name, (total, count) in self.sums.items() if count}
        if "explore_reward" in rollouts.row and len(rollouts):
            agreement = sign_agreement(rollouts)
            numbers |= {} if math.isnan(agreement) else {"sign_agreement": agreement}
        return numbers


def sign_agreement(rollouts: Rollouts) -> float:
    """Share of rows whose final reward is on the side of its group's mean on which the explored one was.

    Rows at the mean in either are left out; NaN if that leaves none. The health of the method: at 0.5 exploring tells
    nothing about what trains.
    """
    sides = []
    for rewards in (rollouts.row["explore_reward"].to(rollouts.rewards), rollouts.rewards):
        sides.append((rewards - rollouts.group_mean(rewards)[rollouts.group]).sign())
    decided = ((sides[0] * sides[1]).abs() == 1).nonzero()[:, 0]
    return float((sides[0] == sides[1])[decided].float().mean()) if len(decided) else math.nan
