# SPDX-License-Identifier: Apache-2.0
"""Whether an engine runs the policy's weights: its log-probabilities beside the policy's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_rl.policies.scoring import completion_states, evaluation_mode
from lit_rl.rollouts import Rollouts
from lit_rl.samplers.base import Sampling
from lit_rl.samplers.support import processed_logprobs

_ROWS, _TOKENS = 4, 128  # completions that are compared, and how many tokens of each: their logits are made in full


class DisagreementError(RuntimeError):
    """An engine's log-probabilities are not those of the policy that it should run."""


class Agreement:
    """Compares an engine's log-probabilities with the policy's own now and then.

    An engine that missed a weight, holds a stale copy of one or applies another rope scaling samples fluent text; only
    its log-probabilities tell.

    Args:
        every: after the first and every so many weight updates; 0: never.
        tolerance: largest mean difference of a completion's log-probabilities, in nats a token; None: 1e-3 for a
            policy in float32, else 0.1.

    Attributes:
        gap: the largest mean difference of the last comparison, in nats a token; None before the first.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, every: int, tolerance: float | None) -> None:
        if every < 0:
            raise ValueError(f"check_every must be 0 (never check) or positive, got {every}.")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}.")
        self.every, self.tolerance = every, tolerance
        self.gap: float | None = None
        self._synced = 0
        self._due = False

    def synced(self) -> None:
        """The engine has taken new weights."""
        self._due |= self.every > 0 and self._synced % self.every == 0
        self._synced += 1

    def check(self, model: nn.Module, rollouts: Rollouts, sampling: Sampling, version: int, engine: str) -> None:
        """Compare, if it is due and there is something to compare.

        Args:
            model: the policy.
            rollouts: what the engine sampled, on the CPU.
            sampling: with which settings.
            version: of the weights; tokens of other versions are left out.
            engine: how to call it.

        Raises:
            DisagreementError: the difference is larger than the tolerance.
        """
        fresh = (rollouts.token["policy_version"] == version) & rollouts.kept_mask()
        fresh[:, _TOKENS:] = False
        rows = fresh.any(1).nonzero()[:_ROWS, 0]
        if not self._due or not len(rows):
            return
        self._due = False
        self.gap = _largest_gap(model, rollouts.select(rows), fresh[rows], sampling)
        single = next(model.parameters()).dtype == torch.float32
        tolerance = self.tolerance if self.tolerance is not None else (1e-3 if single else 0.1)
        if not self.gap <= tolerance:
            raise DisagreementError(
                f"The log-probabilities of {engine} differ from the policy's own by {self.gap:.3g} nats a token "
                f"(tolerance {tolerance:g}): it does not run the policy's weights, or computes with them otherwise. "
                "Use a version that is known to work (docs/samplers.md) or HFSampler; if the engine's lower precision "
                "explains the difference, raise `tolerance` and set the method's `correction`."
            )


@torch.no_grad()
def _largest_gap(model: nn.Module, rollouts: Rollouts, where: Tensor, sampling: Sampling) -> float:
    """The largest mean difference of a row, over the tokens at ``where`` (bool ``[n, T]``), in nats."""
    with evaluation_mode(model):
        states = completion_states(
            model,
            rollouts.prompts.ids,
            rollouts.completion_ids,
            rollouts.completion_mask,
            rollouts.lengths,
            prompt_index=rollouts.group,
            wanted=where,
        )
        distribution = processed_logprobs(states.head.logits(states.hidden), sampling)
    own = distribution.gather(1, rollouts.completion_ids[where].to(distribution.device)[:, None])[:, 0].cpu()
    difference = torch.full(where.shape, math.nan)
    difference[where] = (own - rollouts.logprobs["sampler"][where]).abs()
    difference[difference.isinf()] = math.nan  # rounding may put a token just outside of a restricted support
    return float(difference.nanmean(1).nan_to_num(math.inf).amax())
