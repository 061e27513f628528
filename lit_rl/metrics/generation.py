# SPDX-License-Identifier: Apache-2.0
"""`GenerationMetrics`: what a set of prompts says about a policy, reduced over ranks by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rl.metrics.passk import majority_correct, pass_at_k
from lit_rl.rollouts import Rollouts, StopReason


class GenerationMetrics(Metric):
    """pass@1, unbiased pass@k, maj@k, length and truncated share over prompts with several completions each.

    Args:
        samples: completions of each prompt. pass@k is computed for the powers of two up to it.
        majority: also compute maj@k (`update` then needs ``answers``).
    """

    full_state_update = False

    passed: Tensor
    prompts_at: Tensor
    majority_sum: Tensor
    prompts: Tensor
    tokens: Tensor
    truncated: Tensor
    reward: Tensor
    scored: Tensor
    unscorable: Tensor
    rows: Tensor

    def __init__(self, samples: int = 1, majority: bool = False) -> None:
        super().__init__()
        self.samples, self.majority = samples, majority
        self.ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
        self.add_state("passed", torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts_at", torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("majority_sum", "prompts", "tokens", "truncated", "reward", "scored", "unscorable", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rollouts: Rollouts, answers: Sequence[Hashable | None] | None = None) -> None:
        """Add scored rollouts.

        Args:
            rollouts: N completions with ``correct`` and reward terms.
            answers: N extracted answers, for maj@k.
        """
        correct = rollouts.correct.cpu()
        self.rows += len(rollouts)
        self.tokens += rollouts.generated.sum().double()
        self.truncated += (rollouts.row["stop_reason"] == StopReason.LENGTH).sum().double()
        self.unscorable += torch.isnan(correct).sum().double()
        rewards = rollouts.rewards
        self.reward += torch.nan_to_num(rewards).sum().double()
        self.scored += (~torch.isnan(rewards)).sum().double()
        group = rollouts.group.cpu()
        for g in range(len(rollouts.prompts)):
            rows = ((group == g) & ~torch.isnan(correct)).nonzero()[:, 0].tolist()
            self._add_prompt([float(correct[i]) for i in rows], None if answers is None else [answers[i] for i in rows])

    def _add_prompt(self, verdicts: list[float], answers: list[Hashable | None] | None) -> None:
        if not verdicts:
            return
        right = sum(v > 0.5 for v in verdicts)
        self.prompts += 1
        for i, k in enumerate(self.ks):
            if k <= len(verdicts):
                self.passed[i] += pass_at_k(len(verdicts), right, k)
                self.prompts_at[i] += 1
        if answers is not None:
            self.majority_sum += majority_correct(answers, verdicts)

    def compute(self) -> dict[str, Tensor]:
        """Names without prefix -> scalars. NaN where nothing could be scored."""
        out = {f"pass@{k}": self.passed[i] / self.prompts_at[i] for i, k in enumerate(self.ks)}
        if self.majority and self.samples > 1:
            out[f"maj@{self.samples}"] = self.majority_sum / self.prompts
        out["reward_mean"] = self.reward / self.scored
        out["length_mean"] = self.tokens / self.rows
        out["truncated_ratio"] = self.truncated / self.rows
        out["unscorable_ratio"] = self.unscorable / self.rows
        return {k: v.float() if v.numel() else torch.tensor(math.nan) for k, v in out.items()}
