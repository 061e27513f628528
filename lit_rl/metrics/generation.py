# SPDX-License-Identifier: Apache-2.0
"""`GenerationMetrics`: what a set of prompts says about a policy, reduced over ranks by torchmetrics."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rl.metrics.passk import majority_correct, pass_at_k
from lit_rl.rollouts import Rollouts, StopReason

COUNTS = ("prompts", "voted", "majority", "rows", "tokens", "truncated", "unscorable", "reward", "scored")


class GenerationMetrics(Metric):
    """pass@k, maj@k, length and truncated share over prompts with several completions each.

    A prompt whose completions are not scorable is left out of pass@k and maj@k; one with fewer than k scorable
    completions is left out of pass@k for that k.

    Args:
        samples: completions of each prompt. pass@k is computed for the powers of two up to it, maj@k for k = samples.
    """

    full_state_update = False

    passed: Tensor  # [K] sums of pass@k over prompts
    tried: Tensor  # [K] prompts in them
    prompts: Tensor  # with at least one scorable completion
    voted: Tensor  # of these, prompts whose answers were given
    majority: Tensor  # sum of maj@k over them
    rows: Tensor
    tokens: Tensor
    truncated: Tensor
    unscorable: Tensor
    reward: Tensor  # sum over the scored rows
    scored: Tensor

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        self.samples = samples
        self.ks = [2**i for i in range(samples.bit_length())]
        for name in ("passed", "tried"):
            self.add_state(name, torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        for name in COUNTS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rollouts: Rollouts, answers: Sequence[Hashable | None] | None = None) -> None:
        """Add scored rollouts.

        Args:
            rollouts: N completions with ``correct`` and reward terms.
            answers: N extracted answers for maj@k, None where a completion gave none; None if nobody can extract them.
        """
        correct, rewards = rollouts.correct.cpu(), rollouts.rewards
        self.rows += len(rollouts)
        self.tokens += rollouts.generated.sum()
        self.truncated += (rollouts.row["stop_reason"] == StopReason.LENGTH).sum()
        self.unscorable += torch.isnan(correct).sum().to(self.unscorable.device)
        self.reward += torch.nan_to_num(rewards).double().sum()
        self.scored += (~torch.isnan(rewards)).sum()
        rows_of: list[list[int]] = [[] for _ in range(len(rollouts.prompts))]
        scorable = (~torch.isnan(correct)).tolist()
        for i, g in enumerate(rollouts.group.tolist()):
            if scorable[i]:
                rows_of[g].append(i)
        verdicts = (correct > 0.5).tolist()
        for rows in filter(None, rows_of):
            self._add_prompt([verdicts[i] for i in rows], None if answers is None else [answers[i] for i in rows])

    def _add_prompt(self, verdicts: list[bool], answers: list[Hashable | None] | None) -> None:
        self.prompts += 1
        for i, k in enumerate(self.ks):
            if k <= len(verdicts):
                self.passed[i] += pass_at_k(len(verdicts), sum(verdicts), k)
                self.tried[i] += 1
        if answers is not None:
            self.voted += 1
            self.majority += majority_correct(answers, verdicts)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, without prefix; NaN where nothing could be scored."""
        out = {f"pass@{k}": self.passed[i] / self.tried[i] for i, k in enumerate(self.ks)}
        if self.samples > 1 and self.voted:
            out[f"maj@{self.samples}"] = self.majority / self.voted
        out["reward_mean"] = self.reward / self.scored
        out["length_mean"] = self.tokens / self.rows
        out["truncated_ratio"] = self.truncated / self.rows
        out["unscorable_ratio"] = self.unscorable / self.rows
        return {name: value.float() for name, value in out.items()}
