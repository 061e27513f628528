# SPDX-License-Identifier: Apache-2.0
"""What samplers have in common whose tokens come from an engine outside of lit-rl."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.policies.scoring import evaluation_mode
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import Interrupt, RolloutRequest, Sampling
from lit_rl.samplers.stopping import StopStrings, end_token_ids
from lit_rl.samplers.support import processed_logprobs
from lit_rl.seeding import mix_seeds


class Order(NamedTuple):
    """What an engine is asked for: one completion."""

    row: int  # of the request
    context: list[int]  # token ids of the prompt and of what there is of the completion
    budget: int  # tokens that may follow
    seed: int


@dataclass
class Seen:
    """What `RolloutRequest.should_stop` may look at."""

    step: int
    finished: Tensor
    lengths: Tensor


class Ends:
    """What ends a completion.

    Args:
        model: the policy; its generation config may name end-of-sequence tokens.
        tokenizer: names one too, and decodes where there are stop strings.
        sampling: stop strings and stop token ids.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.end = set(end_token_ids(model, tokenizer))
        self.token_ids = self.end | set(sampling.stop_token_ids)
        self.strings = StopStrings(tokenizer, sampling.stop) if any(sampling.stop) else None

    def reason(self, ids: Sequence[int]) -> StopReason | None:
        """Why a completion ends with the last of its tokens, or None if it goes on."""
        if ids[-1] in self.end:
            return StopReason.END
        if ids[-1] in self.token_ids or (self.strings is not None and self.strings.completed(ids)):
            return StopReason.STOP
        return None


class ExternalRows:
    """The completions of one request, as far as they are.

    The engine draws with its own generator, one for each completion, whose seed depends on (seed, draw, sample, length
    of the prefix): a completion comes out the same in any company. One that is continued goes on with fresh noise, so
    it does not come out as if it had never been interrupted, but it is distributed as if.

    Args:
        request: what to sample.
        ends: what ends a completion.
        max_positions: prompt and completion must fit into these; None: no bound.

    Raises:
        ValueError: a prompt is empty, positions run out, or the request wants noise that engines do not have.
    """

    def __init__(self, request: RolloutRequest, ends: Ends, max_positions: int | None = None) -> None:
        self.request, self.ends = request, ends
        n = len(request)
        budgets = request.budgets if request.budgets is not None else torch.full((n,), request.sampling.max_tokens)
        self.budgets: list[int] = budgets.tolist()
        self.group: list[int] = request.group.tolist()
        self.prefix = self._prefix()
        self.ids = [list(ids) for ids, _ in self.prefix]
        self.logprobs = [list(logprobs) for _, logprobs in self.prefix]
        self.reasons = [self._reason_before(i) for i in range(n)]
        self.step = 0
        self._check(max_positions)

    def _prefix(self) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities that each row begins with."""
        prefix = self.request.prefix
        if prefix is None:
            return [([], [])] * len(self.request)
        logprobs = prefix.logprobs["sampler"].tolist()
        return [(ids, logprobs[i][: len(ids)]) for i, ids in enumerate(prefix.completions())]

    def _reason_before(self, row: int) -> StopReason | None:
        prefix = self.request.prefix
        if prefix is not None and bool(prefix.finished[row]):
            return StopReason(int(prefix.row["stop_reason"][row]))
        return StopReason.LENGTH if len(self.ids[row]) >= self.budgets[row] else None

    def _check(self, max_positions: int | None) -> None:
        if self.request.noise != "uniform":
            raise ValueError(f"noise={self.request.noise!r} needs control over every draw, which engines do not give.")
        prompts = self.request.prompts
        if prompts.model_inputs:
            raise ValueError(
                f"Prompts with further inputs ({', '.join(prompts.model_inputs)}) cannot be sent to an engine: use "
                "HFSampler."
            )
        for group, budget in zip(self.group, self.budgets):
            size = len(prompts.ids[group])
            if size == 0:
                raise ValueError(
                    f"The prompt with uid {int(prompts.uid[group])} has no tokens, so there is nothing to predict a "
                    "first token from: let it be the beginning-of-sequence token."
                )
            if max_positions is not None and size + budget > max_positions:
                raise ValueError(
                    f"A prompt of {size} tokens and a budget of {budget} need {size + budget} positions, but the "
                    f"engine has only {max_positions}: lower max_tokens or max_prompt_tokens, or raise max_model_len."
                )

    def orders(self) -> Iterator[Order]:
        """One for each row that has not ended."""
        request, prompts = self.request, self.request.prompts
        draws, samples = prompts.draw.tolist(), request.sample.tolist()
        for i, group in enumerate(self.group):
            if self.reasons[i] is None:
                done = len(self.ids[i])
                seed = mix_seeds(request.seed, draws[group], samples[i], done)
                yield Order(i, prompts.ids[group].tolist() + self.ids[i], self.budgets[i] - done, seed)

    def add(self, row: int, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Append what the engine has drawn for a row, up to its end. Returns whether the row has ended."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.reasons[row] is not None:
                break
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            reason = self.ends.reason(self.ids[row])
            if reason is None and len(self.ids[row]) >= self.budgets[row]:
                reason = StopReason.LENGTH
            self.reasons[row] = reason
        return self.reasons[row] is not None

    def forget(self) -> None:
        """Begin again with the rows that have not ended: the engine that knew them is gone."""
        for i, reason in enumerate(self.reasons):
            if reason is None:
                self.ids[i], self.logprobs[i] = list(self.prefix[i][0]), list(self.prefix[i][1])

    def interrupted(self) -> bool:
        """Count a step, and ask whether generation is to end with it."""
        self.step += 1
        stop = self.request.should_stop
        if stop is None:
            return False
        if isinstance(stop, Interrupt):
            return bool(stop.requested())
        finished = torch.tensor([reason is not None for reason in self.reasons])
        return bool(stop(Seen(self.step, finished, torch.tensor([len(ids) for ids in self.ids]))))

    def rollouts(self, version: int) -> Rollouts:
        """The batch, on the CPU; rows that have not ended are `StopReason.ABORTED`."""
        request = self.request
        reasons = [StopReason.ABORTED if r is None else r for r in self.reasons]
        out = Rollouts.build(
            request.prompts,
            request.group.cpu(),
            [torch.tensor(ids, dtype=torch.long) for ids in self.ids],
            sampler_logprobs=[torch.tensor(x, dtype=torch.float32) for x in self.logprobs],
            stop_reason=torch.tensor([int(r) for r in reasons], dtype=torch.long),
            sample=request.sample.cpu(),
            policy_version=version,
        )
        if request.prefix is not None:
            self._restore_prefix(out, request.prefix.to("cpu"))
        return out

    def _restore_prefix(self, out: Rollouts, prefix: Rollouts) -> None:
        """Tokens of the prefix keep their masks and the version of the policy that wrote them."""
        width = min(prefix.width, out.width)
        inside = torch.arange(width) < torch.tensor([len(ids) for ids, _ in self.prefix])[:, None]
        for name in ("completion_mask", "loss_weights", "policy_version"):
            if name in prefix.token:
                new = out.token[name]
                new[:, :width] = torch.where(inside, prefix.token[name][:, :width], new[:, :width])


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
        rows: completions that are compared.
    """

    def __init__(self, every: int, tolerance: float | None, rows: int = 4) -> None:
        if every < 0:
            raise ValueError(f"check_every must be 0 (never check) or positive, got {every}.")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}.")
        self.every, self.tolerance, self.rows = every, tolerance, rows
        self.gap: float | None = None  # of the last comparison
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
            rollouts: what the engine sampled.
            sampling: with which settings.
            version: of the weights; tokens of other versions are left out.
            engine: how to call it.

        Raises:
            DisagreementError: the difference is larger than the tolerance.
        """
        fresh = (rollouts.token["policy_version"] == version) & rollouts.completion_mask
        rows = fresh.any(1).nonzero()[: self.rows, 0].tolist()
        if not self._due or not rows:
            return
        self._due = False
        self.gap = max(self._gap(model, rollouts, sampling, row, fresh[row]) for row in rows)
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
    def _gap(self, model: nn.Module, rollouts: Rollouts, sampling: Sampling, row: int, where: Tensor) -> float:
        prompt, n = rollouts.prompts.ids[int(rollouts.group[row])], int(rollouts.lengths[row])
        device = next(model.parameters()).device
        ids = torch.cat([prompt, rollouts.completion_ids[row, :n]]).to(device)
        with evaluation_mode(model):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        own = processed_logprobs(logits, sampling).gather(1, ids[len(prompt) :, None])[:, 0].cpu()
        difference = (own - rollouts.logprobs["sampler"][row, :n]).abs()[where[:n]]
        inside = difference.isfinite()  # rounding may put a token just outside of a restricted support
        return float(difference[inside].mean()) if bool(inside.any()) else math.inf
