# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: the policy writes, an environment answers, until the episode is over."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rl.environments.base import Environment, Episode, Observation, Turn
from lit_rl.environments.calls import call_all
from lit_rl.environments.encoding import ObservationEncoder
from lit_rl.rewards.pool import Outcome
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers.base import Interrupt, Progress, RolloutRequest, RolloutSampler
from lit_rl.samplers.hf import HFSampler
from lit_rl.samplers.wrapping import SamplerWrapper, is_open, replace_rows, unstarted
from lit_rl.seeding import mix_seeds


class EnvironmentSampler(SamplerWrapper):
    """Alternates between the policy (the inner sampler) and an environment, one episode a completion.

    What the environment says is in the sequence and has ``completion_mask`` and ``loss_weights`` 0: it is context and
    never trained. It counts towards the budget of the completion. Ids that the policy sampled are never tokenised
    again.

    A completion ends with `StopReason.END` or ``STOP`` if the episode is over after a turn that ended by itself, with
    ``LENGTH`` if a budget or ``max_turns`` is used up, and with ``ERROR`` if the environment raises or takes too long:
    such a row is not scorable (NaN under every reward), trains nothing, and is counted in the metrics
    ``sampler/environment_error`` and ``sampler/environment_timeout``.

    Rewards of the environment are summed over the turns into the reward term ``environment``.

    Args:
        environment: answers the policy.
        inner: generates the turns; it must be able to continue a prefix. Default `HFSampler`.
        max_turns: turns of the policy in an episode.
        turn_tokens: budget of one turn; None: only the budget of the whole completion counts.
        reward_weight: weight of the reward term ``environment``.
        verifier: the environment's reward is also the verdict (``correct``); leave the method's own rewards unmarked
            then.
        timeout: seconds that one answer may take. A thread that hangs cannot be killed: it stays until it returns.
        workers: answers computed side by side, in threads.
        chat_template_kwargs: further arguments of the chat template, for environments that answer with messages.

    Raises:
        ValueError: an argument is out of range, or ``inner`` cannot continue completions.
    """

    def __init__(
        self,
        environment: Environment,
        inner: RolloutSampler | None = None,
        max_turns: int = 4,
        turn_tokens: int | None = None,
        reward_weight: float = 1.0,
        verifier: bool = False,
        timeout: float = 10.0,
        workers: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(inner or HFSampler())
        positive = {"max_turns": max_turns, "turn_tokens": turn_tokens, "timeout": timeout, "workers": workers}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not self.inner.continues_prefix:
            raise ValueError(
                f"EnvironmentSampler continues completions turn by turn, which {type(self.inner).__name__} cannot: "
                "use HFSampler as `inner`."
            )
        if verifier and not environment.gives_rewards:
            raise ValueError(
                f"verifier=True takes the verdict from the environment's rewards, but {type(environment).__name__} "
                "gives none: mark one of the method's rewards as the verifier instead."
            )
        self.environment, self.max_turns, self.turn_tokens = environment, max_turns, turn_tokens
        self.reward_weight, self.verifier = reward_weight, verifier
        self.timeout, self.workers = timeout, workers
        self.chat_template_kwargs = chat_template_kwargs
        self.continues_prefix = False  # the environment's side of an interrupted episode is gone
        if environment.gives_rewards:
            self.provides = self.provides | {"rewards"} | ({"correct"} if verifier else set())
        self._counts: Counter[str] = Counter()
        self._warned: set[str] = set()

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        super().setup(model, tokenizer)
        self.encoder = ObservationEncoder(tokenizer, self.chat_template_kwargs)

    def generate(self, request: RolloutRequest) -> Rollouts:
        """Whole episodes, all of a request side by side."""
        if request.prefix is not None:
            raise ValueError("EnvironmentSampler cannot continue completions: it has no episodes for them.")
        training = request.wanted is not None
        stop = (*request.sampling.stop, *self.environment.stop)
        request = replace(request, sampling=replace(request.sampling, stop=stop), wanted=None)
        rollouts, state = unstarted(request), _Episodes()
        try:
            rollouts = self._open(rollouts, state, request.seed)
            for turn in range(self.max_turns):
                if not bool(is_open(rollouts).any()):
                    break
                rollouts, began = self._policy_turn(rollouts, request, state)
                if bool(is_open(rollouts).any()):  # the run is being stopped
                    break
                rollouts = self._environment_turn(rollouts, began, state, last=turn == self.max_turns - 1)
            rollouts = self._cut(rollouts, state)
        finally:
            self._call({i: episode.close for i, episode in state.episodes.items() if i not in state.hung})
        if training:
            self._counts.update(state.counts)
        return self._scored(rollouts.trim(), state)

    # The policy ----------------------------------------------------------------------------------------------------

    def _policy_turn(self, rollouts: Rollouts, request: RolloutRequest, state: _Episodes) -> tuple[Rollouts, Tensor]:
        """Let the policy write in every open row. Returns the batch and where each row's turn began, -1 if none did."""
        rows = is_open(rollouts)
        part = rollouts.select(rows)
        budgets = part.row["budget"]
        if self.turn_tokens is not None:
            budgets = torch.minimum(budgets, part.lengths + self.turn_tokens)
        state.counts["turns"] += len(part)
        out = self.inner.sample(
            replace(
                request,
                prompts=part.prompts,
                group=part.group,
                sample=part.row["sample"],
                budgets=budgets,
                prefix=part if part.width else None,
                should_stop=_in_terms_of_all(request.should_stop, rollouts, rows, state),
            )
        )
        began = torch.where(rows, rollouts.lengths, -1)
        return replace_rows(rollouts, rows, out.to("cpu")), began

    # The environment -----------------------------------------------------------------------------------------------

    def _open(self, rollouts: Rollouts, state: _Episodes, seed: int) -> Rollouts:
        """Start an episode for each row and append what it has to say first."""
        prompts = rollouts.prompts
        calls: dict[int, Callable[[], Any]] = {}
        for i, (g, sample) in enumerate(zip(rollouts.group.tolist(), rollouts.row["sample"].tolist())):
            record = {"prompt": prompts.text[g], "source": prompts.source[g], "uid": int(prompts.uid[g])}
            record |= {name: values[g] for name, values in prompts.columns.items()}
            own = mix_seeds(seed, "environment", int(prompts.draw[g]), sample)
            calls[i] = partial(_start, self.environment, record, own)
        answers: dict[int, Turn] = {}
        for i, outcome in self._call(calls).items():
            if self._failed(outcome, i, state):
                continue
            state.episodes[i], opening = outcome.value
            answers[i] = Turn(opening)
        return self._append(self._mark_failed(rollouts, state), answers, {}, state)

    def _environment_turn(self, rollouts: Rollouts, began: Tensor, state: _Episodes, last: bool) -> Rollouts:
        """Give every turn that ended by itself to its episode, and append the answers."""
        texts: dict[int, str] = {}
        for i in ((began >= 0) & rollouts.finished).nonzero()[:, 0].tolist():
            ids = rollouts.completion_ids[i, int(began[i]) : int(rollouts.lengths[i])].tolist()
            texts[i] = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        outcomes = self._call({i: partial(_step, state.episodes[i], text) for i, text in texts.items()})
        answers: dict[int, Turn] = {}
        for i, outcome in outcomes.items():
            if not self._failed(outcome, i, state):
                answers[i] = outcome.value
                state.add_reward(i, outcome.value.reward)
        rollouts = self._mark_failed(rollouts, state)
        going_on = {i: turn for i, turn in answers.items() if not turn.done}
        if last:
            return _end(rollouts, list(going_on), StopReason.LENGTH)
        ended = (rollouts.row["stop_reason"] == StopReason.END).tolist()
        last_token = {i: int(rollouts.completion_ids[i, int(rollouts.lengths[i]) - 1]) for i in going_on if ended[i]}
        return self._append(_end(rollouts, list(going_on), StopReason.ABORTED), going_on, last_token, state)

    def _cut(self, rollouts: Rollouts, state: _Episodes) -> Rollouts:
        """Tell episodes that a budget has ended; they may have a reward for it."""
        rows = (rollouts.row["stop_reason"] == StopReason.LENGTH).nonzero()[:, 0].tolist()
        for i, outcome in self._call({i: state.episodes[i].cut for i in rows}).items():
            if not self._failed(outcome, i, state):
                state.add_reward(i, outcome.value)
        return self._mark_failed(rollouts, state)

    def _append(
        self, rollouts: Rollouts, answers: dict[int, Turn], last_token: dict[int, int], state: _Episodes
    ) -> Rollouts:
        """Add observations to their rows; a row whose budget leaves no room for an answer ends there."""
        ids: dict[int, list[int]] = {}
        full: list[int] = []
        for i, turn in answers.items():
            ids[i] = self.encoder.encode(turn.observation, last_token.get(i))
            if int(rollouts.lengths[i]) + len(ids[i]) >= int(rollouts.row["budget"][i]):
                full.append(i)
        rollouts = _end(rollouts, full, StopReason.LENGTH)
        ids = {i: tokens for i, tokens in ids.items() if i not in full}
        state.counts["observation_tokens"] += sum(map(len, ids.values()))
        return append_tokens(rollouts, ids)

    def _call(self, calls: dict[int, Callable[[], Any]]) -> dict[int, Outcome]:
        return dict(zip(calls, call_all(list(calls.values()), self.timeout, self.workers)))

    # Failures and rewards ------------------------------------------------------------------------------------------

    def _failed(self, outcome: Outcome, i: int, state: _Episodes) -> bool:
        """Whether a call failed; if so it is counted, and warned about when a kind of failure is first seen."""
        if outcome.failure is None:
            return False
        state.failed.add(i)
        state.counts[outcome.failure] += 1
        if outcome.failure == "timeout":
            state.hung.add(i)
        if outcome.failure not in self._warned:
            self._warned.add(outcome.failure)
            warnings.warn(
                f"{type(self.environment).__name__} failed ({outcome.failure}): {outcome.detail}. Its completion is "
                "left out of training as not scorable. Further failures of this kind are counted without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        return True

    def _mark_failed(self, rollouts: Rollouts, state: _Episodes) -> Rollouts:
        rollouts = _end(rollouts, sorted(state.failed), StopReason.ERROR)
        rollouts.loss_weights[sorted(state.failed)] = 0.0
        return rollouts

    def _scored(self, rollouts: Rollouts, state: _Episodes) -> Rollouts:
        del rollouts.row["budget"]
        values = torch.tensor([state.rewards.get(i, math.nan) for i in range(len(rollouts))])
        failed = rollouts.row["stop_reason"] == StopReason.ERROR
        values = torch.where(failed, math.nan, values)
        if self.environment.gives_rewards:
            weights = torch.where(torch.isnan(values), 0.0, self.reward_weight)
            rollouts.reward_terms["environment"], rollouts.reward_weights["environment"] = values, weights
        if self.verifier:
            rollouts.correct = values.clone()
        return rollouts

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Turns a completion, tokens of the environment, and failures by kind."""
        counts, self._counts = self._counts, Counter()
        rows = max(len(rollouts), 1)
        return {
            "environment_turns": counts["turns"] / rows,
            "environment_tokens": counts["observation_tokens"] / rows,
            "environment_error": float(counts["error"]),
            "environment_timeout": float(counts["timeout"]),
            **super().metrics(rollouts),
        }

    def describe(self) -> str:
        turn = "" if self.turn_tokens is None else f" of at most {self.turn_tokens} tokens"
        name = type(self.environment).__name__
        return f"EnvironmentSampler({name}, {self.inner.describe()}, at most {self.max_turns} turns{turn})"


class _Episodes:
    """The environment's side of a request: episodes, rewards and failures by row."""

    def __init__(self) -> None:
        self.episodes: dict[int, Episode] = {}
        self.rewards: dict[int, float] = {}
        self.failed: set[int] = set()
        self.hung: set[int] = set()  # an abandoned thread is still inside the episode
        self.counts: Counter[str] = Counter()
        self.steps = 0  # decode steps of all turns so far

    def add_reward(self, i: int, reward: float | None) -> None:
        if reward is not None:
            self.rewards[i] = self.rewards.get(i, 0.0) + float(reward)


def _start(environment: Environment, record: dict[str, Any], seed: int) -> tuple[Episode, Observation]:
    episode = environment.start(record, seed)
    return episode, _checked(episode.opening())


def _step(episode: Episode, text: str) -> Turn:
    turn = episode.step(text)
    if not isinstance(turn, Turn):
        raise TypeError(f"step() must return a Turn, not {type(turn).__name__}")
    if turn.reward is not None and math.isinf(turn.reward):
        raise ValueError("an infinite reward")
    return turn._replace(observation=_checked(turn.observation))


def _checked(observation: Any) -> Observation:
    messages = isinstance(observation, list) and all(isinstance(m, dict) and "role" in m for m in observation)
    if not isinstance(observation, str) and not messages:
        raise TypeError(f"an observation must be text or a list of messages, not {type(observation).__name__}")
    return observation


def _end(rollouts: Rollouts, rows: list[int], reason: StopReason) -> Rollouts:
    rollouts.row["stop_reason"][rows] = int(reason)
    rollouts.row["finished"][rows] = False
    return rollouts


def append_tokens(rollouts: Rollouts, ids: dict[int, list[int]]) -> Rollouts:
    """The batch with tokens that no model produced appended to some rows (row -> token ids)."""
    width = max([rollouts.width, *(int(rollouts.lengths[i]) + len(tokens) for i, tokens in ids.items())])
    out = rollouts.pad(width).clone()
    for i, tokens in ids.items():
        n = int(out.lengths[i])
        out.completion_ids[i, n : n + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        out.row["lengths"][i] = n + len(tokens)
    return out


@dataclass
class _Seen:
    """Progress of the rows that write, in terms of all rows of the request."""

    step: int
    finished: Tensor
    lengths: Tensor


def _in_terms_of_all(
    should_stop: Callable[[Progress], bool] | None, rollouts: Rollouts, rows: Tensor, state: _Episodes
) -> Callable[[Progress], bool] | None:
    """``should_stop`` of the request for a turn in which only ``rows`` (bool ``[N]``) write."""
    if should_stop is None or isinstance(should_stop, Interrupt):
        return should_stop
    finished, lengths, before = ~rows, rollouts.lengths.clone(), state.steps

    def stop(progress: Progress) -> bool:
        state.steps = before + progress.step
        finished[rows], lengths[rows] = progress.finished, progress.lengths
        return bool(should_stop(_Seen(state.steps, finished.clone(), lengths.clone())))

    return stop
