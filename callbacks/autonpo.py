# SPDX-License-Identifier: Apache-2.0
"""AutoNPO: decide online when to go back, and how far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lit_rl import distributed as ranks
from lit_rl.callbacks.monitor import Monitor
from lit_rl.callbacks.npo import GuidedReplay
from lit_rl.callbacks.npo_guide import ISMode, sample_guide, sample_in_parts
from lit_rl.callbacks.npo_trigger import Stagnation, choose_distance
from lit_rl.callbacks.signal import verdicts
from lit_rl.rewind import StateRing, weights_of
from lit_rl.rollouts import Rollouts


class AutoNPO(GuidedReplay):
    r"""AutoNPO (arXiv 2604.20733): when learning stalls, the present policy helps an earlier self over what it failed.

    A pool holds recent prompts whose groups were almost always wrong. When the reward stagnates while the entropy
    falls, the policy is probed on some of them; if it solves a useful share by now, the rollback distance is
    :math:`\Delta^* = \arg\max_\Delta \hat Q(\Delta) / \hat V(\Delta)` over the saved states: :math:`\hat Q` is its pass
    rate on the pool's prompts of the last Δ steps, :math:`\hat V` grows with the per-token KL to the policy of that
    time. Its correct completions of these prompts are cached, the run goes back by Δ* and replays the segment with
    their help (see `GuidedReplay`). Then the controller is armed again.

    RECONSTRUCTED, because the sources give no numbers or form: all constants of trigger, pool and probe, the grid of
    distances, and both forms of :math:`\hat V`: ``"exp"`` is :math:`e^{c k L}` with k the mean per-token KL (k3
    estimate on the probe's tokens) and L their mean length; ``"kl"`` is :math:`\max(k, floor)`. A raw KL without floor
    would always choose the smallest distance. The trigger starts from nothing after a replay, which keeps the run from
    going back again for Δ* + w steps.

    Logged beside `GuidedReplay`'s: ``npo/pool_size``, ``npo/trigger``; when it fired, ``npo/probe_pass_rate``; when the
    run goes back, ``npo/delta_star`` and, for Δ* and as ``npo/…_<Δ>`` for every Δ, ``npo/q_hat``, ``npo/v_hat`` and
    ``npo/s_hat``.

    Args:
        distances: candidate rollback distances in rollout steps. States are saved, and the trigger is acted upon, at
            multiples of their greatest common divisor.
        gate: replace in groups of at most this accuracy. 0.6 in the paper.
        strict: require less than ``gate``, see `NPOSchedule`.
        is_mode: π_old of the replaced slot, see `NPOSchedule`.
        samples: completions that the guide draws of each prompt of the pool.
        mistake_accuracy: groups of at most this accuracy enter the pool.
        pool_size: prompts in the pool, first in, first out.
        probe_prompts: prompts of the probe, one completion each.
        probe_pass_rate: the probe confirms from this pass rate on.
        v_mode: form of :math:`\hat V`.
        v_scale: c of the exponential form.
        v_floor: floor of the KL form.
        reward_monitor: logged value whose stagnation triggers.
        entropy_monitor: logged value whose fall triggers.
        decay: of both moving averages.
        window: w, steps that both are compared over.
        reward_gain: the reward stagnates if it gained less than this over the window.
        entropy_drop: the entropy falls if it lost more than this share over the window.
        max_interventions: how often the run may go back; 0 leaves it untouched.
        max_bytes: bound on the saved states of one rank.
    """

    folder = "autonpo"

    def __init__(
        self,
        distances: Sequence[int] = (20, 30, 40, 50, 60, 70),
        gate: float = 0.6,
        strict: bool = False,
        is_mode: ISMode = "on_policy",
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
        if min(pool_size, probe_prompts) < 1:
            raise ValueError(f"pool_size and probe_prompts must be at least 1, got {pool_size} and {probe_prompts}.")
        self.distances, self.every = sorted(set(distances)), math.gcd(*distances)
        ring = StateRing(max(distances) // self.every + 1, max_bytes)
        super().__init__(gate, strict, samples, is_mode, ring)
        self.probe_prompts, self.probe_pass_rate = probe_prompts, probe_pass_rate
        self.mistake_accuracy = mistake_accuracy
        self.v_mode, self.v_scale, self.v_floor = v_mode, v_scale, v_floor
        self.entropy_monitor, self.max_interventions = entropy_monitor, max_interventions
        self.monitors = [Monitor(name, type(self).__name__) for name in (reward_monitor, entropy_monitor)]
        self.trigger = Stagnation(decay, window, reward_gain, entropy_drop)
        self.pool: deque[tuple[int, int]] = deque(maxlen=pool_size)  # (rollout step, draw)
        self.fired, self.interventions = False, 0

    def check_setup(self, module: Any) -> None:
        super().check_setup(module)
        if self.entropy_monitor == "policy/entropy" and not module.keep_entropy:
            raise ValueError("AutoNPO watches policy/entropy: set keep_entropy: true, or another entropy_monitor.")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the state that the run starts from."""
        super().on_train_start(trainer, pl_module)
        self._keep(pl_module)

    def on_rewards(self, trainer: Any, module: Any, rollouts: Rollouts) -> Rollouts | None:
        """Note what went wrong, before slots are replaced."""
        if self.max_interventions:
            wrong = rollouts.group_mean(verdicts(rollouts)) <= self.mistake_accuracy
            everywhere, _ = ranks.all_gather_concat(rollouts.prompts.draw.to(rollouts.device)[wrong])
            self.pool += [(module.rollout_step, draw) for draw in everywhere.tolist()]
        return super().on_rewards(trainer, module, rollouts)

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Watch reward and entropy."""
        super().on_metrics(trainer, module, metrics)
        reward, entropy = (monitor.read(metrics) for monitor in self.monitors)
        self.fired = self.trigger.update(reward, entropy) if math.isfinite(reward + entropy) else False
        module.log_dict({"npo/trigger": float(self.fired), "npo/pool_size": float(len(self.pool))})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a replay, or go back if the trigger fired and the probe confirms it."""
        if pl_module.interrupted or not self.max_interventions:
            return
        if self.replay_is_over(pl_module):
            self.trigger.reset()
        elif self.fired and self.cache is None and self.interventions < self.max_interventions:
            self.consider(pl_module)
        self._keep(pl_module)

    def consider(self, module: Any) -> None:
        """Go back if there is somewhere to go back to and the policy solves a useful share of its old failures."""
        now = module.rollout_step
        mistakes = {d: {draw for step, draw in self.pool if step >= now - d} for d in self.distances}
        candidates = [d for d in self.distances if now - d in self.ring.files and mistakes[d]]
        if not candidates:
            return
        probe = list(sample_in_parts(module, [draw for _, draw in self.pool][-self.probe_prompts :], 1, "probe"))
        verdict = torch.cat([part.correct for part in probe]).double()
        right, known = ranks.all_sum(torch.stack([(verdict == 1).sum(), (~torch.isnan(verdict)).sum()])).tolist()
        module.log("npo/probe_pass_rate", right / max(known, 1))
        if right < self.probe_pass_rate * known or not right:
            return
        cache, accuracy = sample_guide(module, sorted(mistakes[candidates[-1]]), self.samples)
        quality = {d: self.quality(accuracy, mistakes[d]) for d in candidates}
        variance = {d: self.variance(module, probe, now - d) for d in candidates}
        best: Any = ranks.broadcast_object(choose_distance(quality, variance))
        if not quality[best]:
            return
        for name, d in {"": best, **{f"_{d}": d for d in candidates}}.items():
            module.log_dict({f"npo/q_hat{name}": quality[d], f"npo/v_hat{name}": variance[d]})
            module.log(f"npo/s_hat{name}", quality[d] / variance[d])
        module.log("npo/delta_star", float(best))
        self.interventions += 1
        self.replay(module, cache.only(mistakes[best]), now - best)

    def quality(self, accuracy: dict[int, float], draws: set[int]) -> float:
        """Q̂(Δ): mean pass rate on the given prompts; those that could not be scored are left out."""
        known = [accuracy[draw] for draw in draws if not math.isnan(accuracy.get(draw, math.nan))]
        return sum(known) / max(len(known), 1)

    def variance(self, module: Any, probe: Sequence[Rollouts], step: int) -> float:
        """V̂(Δ): from the mean per-token KL(present policy ‖ policy of rollout step ``step``) on sampled tokens."""
        sums = torch.zeros(3, dtype=torch.float64, device=module.device)  # KL, tokens, completions
        for part in probe:
            mask = part.kept_mask()
            present, _ = module.policy_logprobs(part, module.model)
            with weights_of(module, self.ring, step):
                earlier, _ = module.policy_logprobs(part, module.model)
            gap = torch.where(mask, earlier - present, 0.0).double()
            k3 = (torch.expm1(gap) - gap).sum()
            sums += torch.stack([k3, mask.sum().double(), torch.tensor(float(len(part))).to(k3)])
        total, tokens, completions = ranks.all_sum(sums).tolist()
        k, length = total / max(tokens, 1), tokens / max(completions, 1)
        return max(k, self.v_floor) if self.v_mode == "kl" else math.exp(min(self.v_scale * k * length, 700.0))

    def _keep(self, module: Any) -> None:
        step = module.rollout_step
        if self.max_interventions and step % self.every == 0 and step not in self.ring.files:
            self.ring.save(module)

    def on_rewind(self, trainer: Any, module: Any, step: int) -> None:
        """Forget the mistakes and the trigger's memory of the abandoned future too."""
        super().on_rewind(trainer, module, step)
        self.pool = deque((mistake for mistake in self.pool if mistake[0] < step), maxlen=self.pool.maxlen)
        self.trigger.reset()

    def state_dict(self) -> dict[str, Any]:
        pool = torch.tensor(list(self.pool), dtype=torch.long).reshape(-1, 2)
        own = {"pool": pool, "interventions": self.interventions, "trigger": self.trigger.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.pool = deque(((step, draw) for step, draw in state_dict["pool"].tolist()), maxlen=self.pool.maxlen)
        self.interventions = state_dict["interventions"]
        self.trigger.load_state_dict(state_dict["trigger"])
