# SPDX-License-Identifier: Apache-2.0
"""Say it in plain words when a run is not learning anything."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_rl.hooks import RolloutCallback

ADVICE = {
    "zero_reward": "every completion scored 0. Look at the rollout files: is the answer format what the verifier "
    "reads, and is max_tokens long enough to reach it?",
    "truncated": "most completions hit the token budget. Raise sampling.max_tokens, or the verifier never sees "
    "an answer.",
    "zero_signal": "most groups have equal rewards and teach nothing. The prompts are too hard or too easy: use "
    "DynamicSampling, other prompts, or a larger group.",
    "unscorable": "rewards fail on most completions. Look at reward/<name>_error, _timeout and _crash.",
    "no_reward": "no completion could be scored at all. Look at reward/<name>_error, _timeout and _crash.",
}


class RewardAlarm(RolloutCallback):
    """Counts bad steps of each kind in a row; after ``patience`` of them warns once, and stops if asked.

    Bad is a step in which every completion scores 0, in which none can be scored, or in which one of the shares below
    is exceeded. Logged: ``alarm/bad_steps``, the longest present row of bad steps.

    Args:
        patience: bad steps in a row before the alarm.
        truncated: alarm if more than this share of completions hits the budget.
        zero_signal: alarm if more than this share of groups teaches nothing.
        unscorable: alarm if more than this share of completions cannot be scored.
        stop: whether an alarm stops the run (after a checkpoint, if there is a `RolloutCheckpoint`).
    """

    rewinds = False

    def __init__(
        self,
        patience: int = 5,
        truncated: float = 0.5,
        zero_signal: float = 0.9,
        unscorable: float = 0.5,
        stop: bool = False,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        self.patience, self.stop = patience, stop
        self.bounds = {"truncated": truncated, "zero_signal": zero_signal, "unscorable": unscorable}
        self.counts: dict[str, int] = dict.fromkeys(ADVICE, 0)
        self.rung: dict[str, bool] = dict.fromkeys(ADVICE, False)

    def check_setup(self, module: Any) -> None:
        """Refuse a method without rewards."""
        if not module.rewards and "rewards" not in module.sampler.provides:
            raise ValueError(f"RewardAlarm watches rewards, but {type(module).__name__} has none: remove it.")

    def on_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
        """Look at what the step measured."""
        reward = metrics.get("reward/mean", math.nan)
        bad = {"zero_reward": reward == 0 and metrics.get("reward/std", 0.0) == 0, "no_reward": math.isnan(reward)}
        bad |= {name: metrics.get(f"rollout/{name}_ratio", 0.0) > bound for name, bound in self.bounds.items()}
        bad["unscorable"] &= not bad["no_reward"]  # one alarm, the one that says most
        bad["zero_signal"] &= not (bad["no_reward"] or bad["unscorable"])
        for name, is_bad in bad.items():
            self.counts[name] = self.counts[name] + 1 if is_bad else 0
            if self.counts[name] >= self.patience and not self.rung[name]:
                self.rung[name] = True
                rank_zero_warn(f"For {self.counts[name]} steps in a row {ADVICE[name]}")
                trainer.should_stop = trainer.should_stop or self.stop
        module.log("alarm/bad_steps", float(max(self.counts.values())))

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "rung": dict(self.rung)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.rung = dict(state_dict["counts"]), dict(state_dict["rung"])
