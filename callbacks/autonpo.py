# SPDX-License-Identifier: Apache-2.0
"""AutoNPO: decide online when to go back, and how far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_rl import distributed as ranks
from lit_rl.callbacks.npo import refuse_stale_samplers
from lit_rl.callbacks.npo_guide import GuideCache, build_cache, inject, sample_prompts
from lit_rl.hooks import RolloutCallback
from lit_rl.rewind import StateRing, rewind, weights_of
from lit_rl.rollouts import Rollouts


def choose_distance(quality: dict[int, float], variance: dict[int, float]) -> int:
    r"""The distance Δ that maximises :math:`\hat S = \hat Q / \hat V`; the smaller one of equals.

    >>> choose_distance({20: 0.3, 30: 0.6}, {20: 1.0, 30: 1.5})
    30
    """
    return min(quality, key=lambda d: (-quality[d] / variance[d], d))


class RewardStagnation:
    """The trigger: the smoothed reward has stopped rising while the smoothed entropy keeps falling.

    Constants are reconstructed: the sources name the two signals but give no numbers.

    Args:
        decay: of both moving averages.
        window: w, steps that both are compared over.
        reward_gain: the reward stagnates if it gained less than this over the window.
        entropy_drop: the entropy falls if it lost more than this share over the window.
    """

    def __init__(self, decay: float, window: int, reward_gain: float, entropy_drop: float) -> None:
        self.decay, self.window = decay, window
        self.reward_gain, self.entropy_drop = reward_gain, entropy_drop
        self.rewards: deque[float] = deque(maxlen=window + 1)
        self.entropies: deque[float] = deque(maxlen=window + 1)

    def update(self, reward: float, entropy: float) -> bool:
        """Take one step's values; True if the trigger fires."""
        for history, value in ((self.rewards, reward), (self.entropies, entropy)):
            history.append(self.decay * history[-1] + (1 - self.decay) * value if history else value)
        if len(self.rewards) <= self.window:
            return False
        stagnates = self.rewards[-1] - self.rewards[0] < self.reward_gain
        return stagnates and self.entropies[-1] < (1 - self.entropy_drop) * self.entropies[0]

    def reset(self) -> None:
        """Forget everything: after a replay the comparison starts anew."""
        self.rewards.clear()
        self.entropies.clear()


class AutoNPO(RolloutCallback):
    r"""AutoNPO (arXiv 2604.20733): when learning stalls, the present policy helps an earlier self over what it failed.

    A pool holds recent prompts whose groups were almost always wrong. When the reward stagnates while the entropy
    falls, the policy is probed on some of them; if it now solves a useful share, the rollback distance is
    :math:`\Delta^* = \arg\max_\Delta \hat Q(\Delta) / \hat V(\Delta)` over the saved states: Q̂ is its pass rate on the
    pool's prompts of the last Δ steps, V̂ grows with the per-token KL between the two policies. Its correct completions
    are cached, the run goes back and replays the segment with slot replacement (see `NPOSchedule`), then goes on.

    RECONSTRUCTED, because the sources give no numbers or form: all constants of trigger, pool and probe, the candidate
    distances' grid, the cooldown, and both forms of V̂: ``"exp"`` is :math:`e^{c k L}` with k the mean per-token KL
    (k3 estimate on the guide's tokens) and L the mean length; ``"kl"`` is :math:`\max(k, floor)`. A raw KL without
    floor would always choose the smallest distance.

    Args:
        distances: candidate rollback distances in rollout steps; states are saved at their greatest common divisor.
        gate: replace in groups of at most this accuracy.
        strict: require less than ``gate``.
        is_mode: π_old of the replaced slot, see `NPOSchedule`.
        samples: completions that the guide draws of each prompt of the pool.
        mistake_accuracy: groups of at most this accuracy enter the pool.
        pool_size: prompts in the pool, first in, first out.
        probe_prompts: prompts of the probe, one completion each.
        probe_pass_rate: the probe confirms from this pass rate on.
        v_mode: form of V̂.
        v_scale: c of the exponential form.
        v_floor: floor of the KL form.
        reward_monitor: logged value whose stagnation triggers.
        entropy_monitor: logged value whose fall triggers.
        decay: of both moving averages.
        window: w, steps that both are compared over.
        reward_gain: stagnation threshold.
        entropy_drop: entropy threshold.
        max_interventions: how often the run may go back; 0 leaves it untouched.
        max_bytes: bound on the saved states.
    """

    requires = frozenset({"correct"})
    rewinds = False

    def __init__(
        self,
        distances: Sequence[int] = (20, 30, 40, 50, 60, 70),
        gate: float = 0.6,
        strict: bool = False,
        is_mode: Literal["on_policy", "exact"] = "on_policy",
        samples: int = 4,
        mistake_accuracy: float = 0.25,
        pool_size: int = 1024,
        probe_prompts: int = 32,
        probe_pass_rate: float = 0.3,
        v_mode: Literal["exp", "kl"] = "exp",
        v_scale: float = 1.0,
        v_floor: float = 1e-3,
        reward_monitor: str = "reward/mean",
        entropy_monitor: str = "policy/entropy",
        decay: float = 0.9,
        window: int = 20,
        reward_gain: float = 0.002,
        entropy_drop: float = 0.05,
        max_interventions: int = 3,
        max_bytes: int | None = None,
    ) -> None:
        if not distances or min(distances) < 1:
            raise ValueError(f"distances must be positive rollout steps, got {list(distances)}.")
        if v_mode not in ("exp", "kl"):
            raise ValueError(f"v_mode must be 'exp' or 'kl', got {v_mode!r}.")
        if is_mode not in ("on_policy", "exact"):
            raise ValueError(f"is_mode must be 'on_policy' or 'exact', got {is_mode!r}.")
        self.distances = sorted(distances)
        self.every = math.gcd(*self.distances)
        self.gate, self.strict, self.is_mode, self.samples = gate, strict, is_mode, samples
        self.mistake_accuracy, self.probe_prompts, self.probe_pass_rate = (
            mistake_accuracy,
            probe_prompts,
            probe_pass_rate,
        )
        self.v_mode, self.v_scale, self.v_floor = v_mode, v_scale, v_floor
        self.reward_monitor, self.entropy_monitor = reward_monitor, entropy_monitor
        self.max_interventions = max_interventions
        self.trigger = RewardStagnation(decay, window, reward_gain, entropy_drop)
        self.ring = StateRing(Path("."), max(self.distances) // self.every + 1, max_bytes)
        self.pool: deque[tuple[int, int]] = deque(maxlen=pool_size)  # (draw, rollout step)
        self.cache: GuideCache | None = None
        self.replay_until = self.armed_from = self.interventions = 0

    def check_setup(self, module: Any) -> None:
        """Refuse samplers that carry completions over, and a guide that could not be told from the policy."""
        refuse_stale_samplers(type(self).__name__, module)
        if self.entropy_monitor == "policy/entropy" and not module.keep_entropy:
            raise ValueError("AutoNPO watches policy/entropy: set keep_entropy: true, or another entropy_monitor.")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state that the run starts from."""
        self.ring.folder = pl_module.run_dir / "npo"
        self._keep(pl_module)

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Note what went wrong; during a replay, replace slots."""
        if not self.max_interventions:
            return None
        wrong = rollouts.group_mean(rollouts.correct) <= self.mistake_accuracy
        draws = rollouts.prompts.draw.to(rollouts.device)[wrong]
        everyone, _ = ranks.all_gather_concat(draws)
        self.pool += [(draw, module.rollout_step) for draw in everyone.tolist()]
        module.ledger.mean("npo/pool_size", torch.tensor([float(len(self.pool))]))
        if self.cache is None:
            return None
        return inject(module, rollouts, self.cache, self.gate, self.strict, self.is_mode)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a replay, or watch the trigger and intervene."""
        if pl_module.interrupted or not self.max_interventions:
            return
        if self.cache is not None and pl_module.rollout_step >= self.replay_until:
            self.cache = None
        reward, entropy = (
            float(trainer.callback_metrics.get(name, math.nan)) for name in (self.reward_monitor, self.entropy_monitor)
        )
        fired = math.isfinite(reward) and math.isfinite(entropy) and self.trigger.update(reward, entropy)
        ready = self.cache is None and self.interventions < self.max_interventions
        fired = fired and ready and pl_module.rollout_step >= self.armed_from
        pl_module.log_dict({"npo/trigger": float(fired), "npo/replaying": float(self.cache is not None)})
        if fired and self.probe(pl_module):
            self.intervene(pl_module)
        self._keep(pl_module)

    def probe(self, module: Any) -> bool:
        """Whether the policy now solves a useful share of its old failures."""
        recent = [draw for draw, _ in list(self.pool)[-self.probe_prompts :]]
        if not recent:
            return False
        verdicts = sample_prompts(module, recent, 1, "probe").correct
        rate = float(ranks.broadcast_object(float(torch.nan_to_num(verdicts).mean())))  # type: ignore[arg-type]
        module.log("npo/probe_pass_rate", rate)
        return rate >= self.probe_pass_rate

    def intervene(self, module: Any) -> None:
        """Choose Δ, cache the guide's completions, go back."""
        now = module.rollout_step
        saved = [d for d in self.distances if now - d in self.ring.files]
        within = {d: {draw for draw, step in self.pool if step >= now - d} for d in saved}
        saved = [d for d in saved if within[d]]
        if not saved:
            return
        guide = sample_prompts(module, sorted(within[saved[-1]]), self.samples, "guide")
        quality = self.quality(guide, {d: within[d] for d in saved})
        variance = {d: self.variance(module, guide, now - d) for d in saved}
        best = int(str(ranks.broadcast_object(choose_distance(quality, variance))))
        keep = torch.tensor([int(d) in within[best] for d in guide.prompts.draw], device=guide.device)
        self.cache = build_cache(module, guide.select_groups(keep))
        score = quality[best] / variance[best]
        module.log_dict(
            {"npo/delta_star": float(best), "npo/q_hat": quality[best], "npo/v_hat": variance[best], "npo/s_hat": score}
        )
        for d in saved:
            module.log_dict({f"npo/q_hat_{d}": quality[d], f"npo/v_hat_{d}": variance[d]})
        self.pool = deque((x for x in self.pool if x[1] < now - best), maxlen=self.pool.maxlen)
        rewind(module, self.ring, now - best)
        self.replay_until, self.armed_from = now, now + self.trigger.window
        self.interventions += 1
        self.trigger.reset()
        rank_zero_info(
            f"AutoNPO: back by {best} to rollout step {now - best} with {len(self.cache)} guide completions."
        )

    def quality(self, guide: Rollouts, prompts: dict[int, set[int]]) -> dict[int, float]:
        """Q̂(Δ): pass rate of the guide on the pool's prompts of the last Δ steps."""
        rate = torch.nan_to_num(guide.group_mean(guide.correct)).tolist()
        by_draw = {int(d): r for d, r in zip(guide.prompts.draw, rate)}
        return {d: sum(by_draw[x] for x in draws) / len(draws) for d, draws in prompts.items()}

    def variance(self, module: Any, guide: Rollouts, step: int) -> float:
        """V̂: from the mean per-token KL(guide ‖ state at ``step``) on the guide's tokens."""
        mask = guide.kept_mask()
        with weights_of(module, self.ring, step):
            earlier, _ = module.policy_logprobs(guide, module.model)
        gap = torch.where(mask, earlier - guide.logprobs["sampler"], 0.0)
        k = float((gap.exp() - gap - 1).sum() / mask.sum().clamp(min=1))
        if self.v_mode == "kl":
            return max(k, self.v_floor)
        return math.exp(min(self.v_scale * k * float(guide.lengths.float().mean()), 700.0))

    def _keep(self, module: Any) -> None:
        if self.max_interventions and module.rollout_step % self.every == 0:
            self.ring.save(module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Delete states that no kept checkpoint refers to."""
        self.ring.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        return {
            "ring": self.ring.state_dict(),
            "pool": list(self.pool),
            "cache": None if self.cache is None else self.cache.state_dict(),
            "replay_until": self.replay_until,
            "armed_from": self.armed_from,
            "interventions": self.interventions,
            "rewards": list(self.trigger.rewards),
            "entropies": list(self.trigger.entropies),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ring.load_state_dict(state_dict["ring"])
        self.pool = deque((tuple(x) for x in state_dict["pool"]), maxlen=self.pool.maxlen)
        cache = state_dict["cache"]
        self.cache = None if cache is None else GuideCache.from_state(cache)
        for name in ("replay_until", "armed_from", "interventions"):
            setattr(self, name, state_dict[name])
        self.trigger.rewards = deque(state_dict["rewards"], maxlen=self.trigger.window + 1)
        self.trigger.entropies = deque(state_dict["entropies"], maxlen=self.trigger.window + 1)
