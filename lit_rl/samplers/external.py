# SPDX-License-Identifier: Apache-2.0
"""What samplers have in common whose tokens come from an engine outside of lit-rl."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.objectives import OffPolicyCorrection
from lit_rl.policies.scoring import bare_model, find_head
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.agreement import Agreement
from lit_rl.samplers.base import Interrupt, RolloutRequest, RolloutSampler
from lit_rl.samplers.stopping import Stopping
from lit_rl.seeding import mix_seeds

_log = logging.getLogger(__name__)


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
    """What ends a completion, as sets: rows grow by a token at a time.

    Args:
        stopping: the same as tables over the vocabulary.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.end = set(stopping.is_end.nonzero()[:, 0].tolist())
        self.token_ids = set(stopping.ends.nonzero()[:, 0].tolist())
        self.strings = stopping.strings
        self.suspects = set() if stopping.suspect is None else set(stopping.suspect.nonzero()[:, 0].tolist())

    def reason(self, ids: Sequence[int]) -> StopReason | None:
        """Why a completion ends with the last of its tokens, or None if it goes on."""
        if ids[-1] in self.end:
            return StopReason.END
        stopped = ids[-1] in self.token_ids
        if not stopped and self.strings is not None and ids[-1] in self.suspects:
            stopped = self.strings.completed(ids)
        return StopReason.STOP if stopped else None


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


class ExternalSampler(RolloutSampler):
    """What the samplers with an outside engine share; a subclass implements `generate` and `sync`.

    The engine computes with other kernels than the trainer. Its log-probabilities are therefore never taken for the
    trainer's own, and the loss weighs each token with the bounded ratio of the two, unless the method sets its own
    ``correction``.

    Args:
        max_weight: bound of the ratio in the loss.
        check_every: compare the engine's log-probabilities with the policy's after the first and every so many updates
            (0: never), see `Agreement`.
        tolerance: largest mean difference in nats a token.
        max_restarts: how often in a run the engine may fail.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, max_weight: float, check_every: int, tolerance: float | None, max_restarts: int) -> None:
        if max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, got {max_restarts}.")
        self.loss_correction = OffPolicyCorrection("token", weight_high=max_weight)
        self.agreement = Agreement(check_every, tolerance)
        self.max_restarts, self.restarts = max_restarts, 0
        self.sync_seconds = 0.0
        self._pending: deque[RolloutRequest] = deque()
        self._ends: dict[tuple[Any, ...], Ends] = {}

    @abstractmethod
    def generate(self, request: RolloutRequest) -> ExternalRows:
        """The rows of a request, all ended unless it asked to stop."""

    def setup(self, model: nn.Module, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        self._ends.clear()

    def submit(self, request: RolloutRequest) -> None:
        """Keep the request for `collect`, which does the work."""
        self._pending.append(request)

    def collect(self) -> Rollouts:
        """Generate the completions of the oldest request.

        Raises:
            ValueError: a prompt is empty, or longer with its budget than the engine's positions.
            RuntimeError: the engine failed more than ``max_restarts`` times.
            DisagreementError: its log-probabilities are not the policy's.
        """
        if not self._pending:
            raise RuntimeError(f"{type(self).__name__} has nothing to collect: submit a request first.")
        request = self._pending.popleft()
        out = self.generate(request).rollouts(self.policy_version)
        self.agreement.check(self.model, out, request.sampling, self.policy_version, type(self).__name__)
        return out.to(next(self.model.parameters()).device)

    def rows_of(self, request: RolloutRequest, max_positions: int | None) -> ExternalRows:
        """The rows of a request before the engine has drawn anything."""
        sampling = request.sampling
        key = (tuple(sampling.stop), tuple(sampling.stop_token_ids))
        if key not in self._ends:  # reading a large vocabulary takes about a second
            head = find_head(self.model)
            stopping = Stopping(
                bare_model(self.model), self.tokenizer, sampling, vocab_size=head.vocab_size, device="cpu"
            )
            self._ends[key] = Ends(stopping)
        return ExternalRows(request, self._ends[key], max_positions)

    def count_failure(self, error: Exception, what: str, hint: str) -> None:
        """Note that the engine failed; ``RuntimeError`` with ``hint`` if that was once too often."""
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise RuntimeError(
                f"{what} failed {self.restarts} times (max_restarts={self.max_restarts}), the last time with "
                f"{type(error).__name__}: {error}. {hint}"
            ) from error
        _log.warning(
            "%s failed (%s: %s); what it had not finished is sampled again.", what, type(error).__name__, error
        )

    def on_rewind(self, model: nn.Module) -> None:
        """Forget requests that were not collected."""
        self._pending.clear()

    def return_to(self, boundary: Any) -> None:
        self._pending.clear()

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Seconds of the last weight update, restarts, and the difference that the last comparison found."""
        numbers = {"sync_seconds": self.sync_seconds, "restarts": float(self.restarts)}
        return numbers | ({} if self.agreement.gap is None else {"logprob_gap": self.agreement.gap})
