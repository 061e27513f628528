# SPDX-License-Identifier: Apache-2.0
"""NPO by a manual schedule: train ahead, go back, and let the later self help where the earlier one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_rl.callbacks.npo_guide import GuideCache, build_cache, inject, sample_prompts
from lit_rl.hooks import RolloutCallback
from lit_rl.rewind import StateRing, rewind
from lit_rl.rollouts import Rollouts


class NPOSchedule(RolloutCallback):
    r"""Near-Future Policy Optimization with a given segment (arXiv 2604.20733).

    The run trains from rollout step ``start`` to ``end``. There its policy becomes the guide: it samples the segment's
    prompts, one verified-correct completion each is cached, the run goes back to ``start`` and replays the segment.
    On a prompt whose group accuracy is at most ``gate`` the last completion of the group is replaced by the guide's.
    The *early bootstrap* is ``start=0``; the *late plateau breakthrough* is a segment on the plateau.

    Rewards and group statistics are computed after the replacement. π_old of the replaced slot is the current policy
    (``is_mode="on_policy"``, the authors' public framework) or the guide (``"exact"``).

    Args:
        start: first rollout step of the segment.
        end: rollout step whose policy is the guide.
        gate: replace in groups of at most this accuracy; negative never replaces.
        strict: require less than ``gate`` (the public framework's test; the paper's formula has at most).
        samples: completions that the guide draws of each prompt.
        is_mode: π_old of the replaced slot.
    """

    requires = frozenset({"correct"})
    rewinds = False

    def __init__(
        self,
        start: int,
        end: int,
        gate: float = 0.6,
        strict: bool = False,
        samples: int = 4,
        is_mode: Literal["on_policy", "exact"] = "on_policy",
    ) -> None:
        if not 0 <= start < end:
            raise ValueError(f"0 <= start < end must hold, got start={start}, end={end}.")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        if is_mode not in ("on_policy", "exact"):
            raise ValueError(f"is_mode must be 'on_policy' or 'exact', got {is_mode!r}.")
        self.start, self.end, self.gate, self.strict = start, end, gate, strict
        self.samples, self.is_mode = samples, is_mode
        self.ring = StateRing(Path("."), 1)
        self.segment: list[int] = []
        self.cache: GuideCache | None = None
        self.done = gate < 0

    def check_setup(self, module: Any) -> None:
        refuse_stale_samplers(type(self).__name__, module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state at the start of the segment."""
        self.ring.folder = pl_module.run_dir / "npo"
        self._keep_start(pl_module)

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Remember the segment's prompts; replace slots while it is replayed."""
        if self.cache is not None:
            return inject(module, rollouts, self.cache, self.gate, self.strict, self.is_mode)
        if not self.done and self.start <= module.rollout_step < self.end:
            self.segment += gathered_draws(rollouts)
        return None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of the segment, go back; at the end of the replay, drop the cache."""
        if pl_module.interrupted:
            return
        pl_module.log("npo/replaying", float(self.cache is not None))
        if self.cache is not None and pl_module.rollout_step >= self.end:
            self.cache = None
        elif not self.done and pl_module.rollout_step == self.end:
            guide = sample_prompts(pl_module, self.segment, self.samples, "guide")
            self.cache, self.done, self.segment = build_cache(pl_module, guide), True, []
            rewind(pl_module, self.ring, self.start)
            rank_zero_info(f"NPO: back to rollout step {self.start} with {len(self.cache)} guide completions.")
        self._keep_start(pl_module)

    def _keep_start(self, module: Any) -> None:
        if not self.done and module.rollout_step == self.start and not self.ring.steps():
            self.ring.save(module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Delete states that no kept checkpoint refers to."""
        self.ring.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        cache = None if self.cache is None else self.cache.state_dict()
        return {"ring": self.ring.state_dict(), "segment": list(self.segment), "cache": cache, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ring.load_state_dict(state_dict["ring"])
        self.segment, self.done = list(state_dict["segment"]), state_dict["done"]
        cache = state_dict["cache"]
        self.cache = None if cache is None else GuideCache.from_state(cache)


def gathered_draws(rollouts: Rollouts) -> list[int]:
    """Draws of the prompts of all ranks, in drawing order."""
    from lit_rl.distributed import all_gather_concat

    return all_gather_concat(rollouts.prompts.draw.to(rollouts.device))[0].tolist()


def refuse_stale_samplers(name: str, module: Any) -> None:
    """Rewinding has no meaning for completions that are in flight from an abandoned future."""
    sampler = module.sampler
    if getattr(sampler, "carries_over", False):
        raise ValueError(
            f"{name} rewinds the run, but {type(sampler).__name__} carries unfinished completions from step to step: "
            "they would come from the abandoned future. Use a sampler that finishes every batch, such as HFSampler."
        )
