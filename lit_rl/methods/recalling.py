# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of the step: signals that somebody requires, each from its provider, once, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rl.methods.batching import micro_batches
from lit_rl.policies import FrozenPolicy, completion_logprobs
from lit_rl.policies.scoring import evaluation_mode
from lit_rl.rollouts import Origin, Rollouts

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule

Provider = Callable[["RLModule", Rollouts], None]


class RecallStage:
    """The recall of an `RLModule`, and scoring under any policy."""

    required: list[str]
    providers: dict[str, Provider]

    def recall(self: RLModule, rollouts: Rollouts) -> Rollouts:
        """Stage 2: every signal that a term or a callback requires, from its provider."""
        with self.ledger.timed("recall"):
            for signal in self.required:
                self.providers[signal](self, rollouts)
            if self.updates_per_step > 1:
                self.fill_old_logprobs(rollouts)
        return rollouts

    def default_providers(self: RLModule) -> dict[str, Provider]:
        """What the core itself can provide. ``module.providers`` adds to it, or replaces entries."""
        frozen = {f"logprobs.{name}": partial(frozen_logprobs, name=name) for name in self.frozen_policies()}
        return {"logprobs.old": type(self).fill_old_logprobs, "entropy": policy_entropy, **frozen}

    def fill_old_logprobs(self: RLModule, rollouts: Rollouts) -> None:
        """Store π_old where nobody did: several updates move π_θ away from it."""
        if not rollouts.width:
            return
        old = rollouts.logprobs.get("old", torch.full_like(rollouts.loss_weights, math.nan))
        missing = torch.isnan(old) & rollouts.completion_mask
        if self.old_logprobs != "recompute" and "sampler" in rollouts.logprobs:
            sampler = rollouts.logprobs["sampler"]
            trusted = missing & self.sampled_by_policy(rollouts)[:, None] & ~torch.isnan(sampler)
            old = torch.where(trusted, sampler, old)
            missing = missing & ~trusted
        rows = missing.any(1).nonzero()[:, 0]
        if len(rows):
            recomputed, _ = self.policy_logprobs(rollouts.select(rows), self.model)
            old = old.index_put((rows,), torch.where(missing[rows], recomputed.to(old.dtype), old[rows]))
        rollouts.logprobs["old"] = torch.where(rollouts.completion_mask, old, 0.0)

    def sampled_by_policy(self: RLModule, rollouts: Rollouts) -> Tensor:
        """``[N]`` bool: rows whose sampler log-probabilities are certainly those of the policy before the update.

        Only in single precision: elsewhere the sampler's numbers are rounded differently from the trainer's.
        """
        if self.old_logprobs == "sampler":
            return torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.device)
        exact = self.sampler.in_process and self.sampled_plainly and self.trainer.precision == "32-true"
        current = (rollouts.token["policy_version"] == self.policy_version) | ~rollouts.completion_mask
        return (rollouts.origin == Origin.POLICY) & current.all(1) & exact

    @torch.no_grad()
    def policy_logprobs(
        self: RLModule,
        rollouts: Rollouts,
        model: torch.nn.Module,
        prompt_ids: list[Tensor] | None = None,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Score a batch under any policy, in micro-batches, without gradient.

        Args:
            rollouts: N completions.
            model: the causal language model to score with.
            prompt_ids: B other prompts (a privileged teacher's, say); default the batch's own.
            entropy: whether to return entropies.

        Returns:
            Log-probabilities and entropies (or None), ``[N, T]``, 0 outside the completions.
        """
        logprobs = torch.zeros(len(rollouts), rollouts.width, device=rollouts.device)
        entropies = torch.zeros_like(logprobs) if entropy else None
        wanted = rollouts.kept_mask()
        with evaluation_mode(model):
            for rows in self.micro_batch_rows(rollouts):
                part, part_entropy = completion_logprobs(
                    model,
                    prompt_ids if prompt_ids is not None else rollouts.prompts.ids,
                    rollouts.completion_ids[rows],
                    rollouts.completion_mask[rows],
                    rollouts.lengths[rows],
                    prompt_index=rollouts.group[rows],
                    temperature=self.sampling.temperature or 1.0,
                    entropy=entropy,
                    wanted=wanted[rows],
                )
                logprobs = logprobs.to(part.dtype)
                logprobs[rows] = part
                if entropies is not None and part_entropy is not None:
                    entropies = entropies.to(part_entropy.dtype)
                    entropies[rows] = part_entropy
        return logprobs, entropies

    def micro_batch_rows(self: RLModule, batch: Rollouts) -> list[Tensor]:
        """Row indices of the micro-batches of a batch, within the token budget."""
        return [rows.to(batch.device) for rows in micro_batches(batch, self.micro_batch_tokens)]


def frozen_logprobs(module: RLModule, rollouts: Rollouts, name: str) -> None:
    """Provider of ``logprobs.<name>``: one of the module's frozen policies scores the batch."""
    rollouts.logprobs[name] = scored_by(module.frozen_policies()[name], module, rollouts)


def scored_by(policy: FrozenPolicy, module: RLModule, rollouts: Rollouts) -> Tensor:
    """``[N, T]``: a frozen policy's log-probabilities of a batch."""
    temperature = module.sampling.temperature or 1.0
    return policy.score(
        module.model, rollouts, lambda batch, model: module.policy_logprobs(batch, model)[0], temperature
    )


def policy_entropy(module: RLModule, rollouts: Rollouts) -> None:
    """Provider of ``entropy``, where the sampler gives none: that of the policy before the update."""
    if "entropy" not in rollouts.token:
        entropies = module.policy_logprobs(rollouts, module.model, entropy=True)[1]
        assert entropies is not None
        rollouts.token["entropy"] = entropies
