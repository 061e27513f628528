# SPDX-License-Identifier: Apache-2.0
"""NPO: go back, and let the later self help where the earlier one fails. By a manual schedule, or as a base."""

from __future__ import annotations

from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_rl import distributed as ranks
from lit_rl.callbacks.npo_guide import GuideCache, ISMode, eligible_groups, replace_slots, sample_guide
from lit_rl.callbacks.signal import require_all_groups
from lit_rl.hooks import RolloutCallback
from lit_rl.rewind import StateRing, check_rewinder, rewind
from lit_rl.rollouts import Origin, Rollouts


class GuidedReplay(RolloutCallback):
    r"""A segment of the run is replayed, and a later policy's completions take slots in the groups that fail.

    On a prompt whose group accuracy :math:`\hat p` is at most ``gate`` and for which the guide has a verified-correct
    completion, the last completion of the group is replaced by it (arXiv 2604.20733). :math:`\hat p` is measured before
    the replacement, rewards and group statistics are computed after it. Subclasses decide when to go back and how far
    (`replay`).

    Logged: ``npo/replaying``; during a replay ``npo/candidates`` (groups for which the guide has a completion),
    ``npo/injected_groups`` and ``npo/guide_ratio_mean`` (mean of π_θ over the guide on the guide's tokens); at a step
    that ends with samples of the guide or a probe ``npo/guide_tokens``, which ``rollout/tokens`` does not count.
    """

    requires = frozenset({"correct"})
    rewinds = False
    folder = "npo"

    def __init__(self, gate: float, strict: bool, samples: int, is_mode: ISMode, ring: StateRing) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        if is_mode not in get_args(ISMode):
            raise ValueError(f"is_mode must be one of {list(get_args(ISMode))}, got {is_mode!r}.")
        self.gate, self.strict, self.samples, self.is_mode, self.ring = gate, strict, samples, is_mode, ring
        self.cache: GuideCache | None = None
        self.replay_until = 0

    def check_setup(self, module: Any) -> None:
        """Refuse samplers that carry completions over, and lists in which failing groups are dropped before."""
        check_rewinder(self, module)
        require_all_groups(self, "on_rewards", module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the saved states."""
        self.ring.open(pl_module, self.folder)

    def replay(self, module: Any, cache: GuideCache, step: int) -> None:
        """Go back to a saved rollout step and come forward again with the guide's help."""
        self.cache, self.replay_until = cache, module.rollout_step
        rewind(module, self.ring, step)
        rank_zero_info(
            f"{type(self).__name__}: back from rollout step {self.replay_until} to {step} with {len(cache)} guide "
            "completions."
        )

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """During a replay, replace slots and score the groups again."""
        if self.cache is None:
            return None
        groups = eligible_groups(rollouts, self.cache, self.gate, self.strict)
        candidates = sum(draw in self.cache for draw in rollouts.prompts.draw.tolist())
        rollouts, rows = replace_slots(rollouts, groups, self.cache, self.is_mode)
        module.rescore(rollouts, rows)
        module.ledger.total("npo/candidates", float(candidates))
        module.ledger.total("npo/injected_groups", groups.sum())
        return rollouts

    def on_micro_batch(self, trainer: Any, module: Any, micro: Rollouts, current: Any) -> None:
        """How near the policy is to its guide."""
        where = micro.kept_mask() & (micro.origin == Origin.GUIDE)[:, None]
        if self.cache is not None and where.any():
            ratio = (current.logprobs.detach() - micro.logprobs["sampler"]).exp()
            module.ledger.mean("npo/guide_ratio_mean", ratio, where)

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Make the replayed segment visible."""
        module.log("npo/replaying", float(self.cache is not None))

    def replay_is_over(self, module: Any) -> bool:
        """At the end of a replay: drop the cache."""
        over = self.cache is not None and module.rollout_step >= self.replay_until
        if over:
            self.cache = None
        return over

    def on_rewind(self, trainer: Any, module: Any, step: int) -> None:
        """Forget the states of the abandoned future."""
        self.ring.forget_after(step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The checkpoint refers to the ring's files."""
        self.ring.refer(pl_module)

    def state_dict(self) -> dict[str, Any]:
        cache = None if self.cache is None else self.cache.state_dict()
        return {"ring": self.ring.state_dict(), "cache": cache, "replay_until": self.replay_until}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ring.load_state_dict(state_dict["ring"])
        self.cache = None if state_dict["cache"] is None else GuideCache(**state_dict["cache"])
        self.replay_until = state_dict["replay_until"]


class NPOSchedule(GuidedReplay):
    """Near-Future Policy Optimization with a given segment (arXiv 2604.20733).

    The run trains from rollout step ``start`` to ``end``. There its policy becomes the guide: it samples the segment's
    prompts, one verified-correct completion each is cached, the run goes back to ``start`` and replays the segment (see
    `GuidedReplay`). The *early bootstrap* is ``start=0``; the *late plateau breakthrough* is a segment on the plateau.

    Args:
        start: first rollout step of the segment.
        end: rollout step whose policy is the guide.
        gate: replace in groups of at most this accuracy; negative never goes back. 0.6 in the paper.
        strict: require less than ``gate`` (the authors' public framework; the paper's formula has at most).
        samples: completions that the guide draws of each prompt.
        is_mode: π_old of the replaced slot: the current policy (``on_policy``, as in the public framework, so the ratio
            starts at 1) or the guide (``exact``).
    """

    def __init__(
        self,
        start: int,
        end: int,
        gate: float = 0.6,
        strict: bool = False,
        samples: int = 4,
        is_mode: ISMode = "on_policy",
    ) -> None:
        if not 0 <= start < end:
            raise ValueError(f"0 <= start < end must hold, got start={start}, end={end}.")
        super().__init__(gate, strict, samples, is_mode, StateRing(max_entries=1))
        self.start, self.end, self.done = start, end, gate < 0
        self.segment: list[tuple[int, int]] = []  # (rollout step, draw) of the prompts that were seen

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        if self.end > module.max_rollouts:
            raise ValueError(
                f"NPOSchedule(end={self.end}) never goes back: the run has {module.max_rollouts} rollouts."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state at the start of the segment."""
        super().on_train_start(trainer, pl_module)
        self._keep_start(pl_module)
        if not self.done and pl_module.rollout_step > self.start and not self.ring.steps():
            raise ValueError(
                f"NPOSchedule(start={self.start}) must go back to rollout step {self.start}, but the run is resumed at "
                f"{pl_module.rollout_step} and no state of that step was saved: choose a later segment."
            )

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Remember the segment's prompts; replace slots while it is replayed."""
        if not self.done and self.start <= module.rollout_step < self.end:
            everywhere, _ = ranks.all_gather_concat(rollouts.prompts.draw.to(rollouts.device))
            self.segment += [(module.rollout_step, draw) for draw in everywhere.tolist()]
        return super().on_rewards(trainer, module, rollouts)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of the segment go back, at the end of the replay drop the cache."""
        if pl_module.interrupted or self.replay_is_over(pl_module):
            return
        if not self.done and pl_module.rollout_step == self.end:
            self.done = True
            cache, _ = sample_guide(pl_module, sorted({draw for _, draw in self.segment}), self.samples)
            self.replay(pl_module, cache, self.start)
            self.segment, self.ring.files = [], {}
        self._keep_start(pl_module)

    def _keep_start(self, module: Any) -> None:
        if not self.done and module.rollout_step == self.start and not self.ring.steps():
            self.ring.save(module)

    def on_rewind(self, trainer: Any, module: Any, step: int) -> None:
        """Forget the prompts of the abandoned future too."""
        super().on_rewind(trainer, module, step)
        self.segment = [(seen, draw) for seen, draw in self.segment if seen < step]

    def state_dict(self) -> dict[str, Any]:
        segment = torch.tensor(self.segment, dtype=torch.long).reshape(-1, 2)
        return super().state_dict() | {"segment": segment, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.segment = [(seen, draw) for seen, draw in state_dict["segment"].tolist()]
        self.done = state_dict["done"]
