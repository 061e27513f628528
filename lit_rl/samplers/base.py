# SPDX-License-Identifier: Apache-2.0
"""What every rollout sampler promises: requests in, completions with log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from lit_rl.rollouts import Edit, Prompts, Rollouts, occurrence

if TYPE_CHECKING:
    from lit_rl.methods.module import RLModule
    from lit_rl.objectives import OffPolicyCorrection


@dataclass
class Sampling:
    """How to draw tokens.

    Args:
        temperature: divides the logits; 0 is greedy (log-probabilities are then those of temperature 1).
        top_p: keep the smallest set of tokens whose probability reaches this (1 keeps all).
        top_k: keep the k most likely tokens (0 keeps all).
        min_p: keep tokens of at least this fraction of the largest probability (0 keeps all).
        max_tokens: budget of a completion in tokens.
        stop: strings that end a completion (the completion ends with the token that completes the string).
        stop_token_ids: token ids that end a completion, besides the end-of-sequence token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: Sequence[str] = field(default_factory=tuple)
    stop_token_ids: Sequence[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (keep every token) or positive, got {self.top_k}.")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}; 0 keeps every token.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, so that the policy's own log-probabilities are the sampler's."""
        return self.top_p == 1 and self.top_k == 0 and self.min_p == 0 and self.temperature > 0


class Progress(Protocol):
    """What a running sampler shows to `RolloutRequest.should_stop` after every decode step."""

    step: int
    finished: Tensor  # [N] bool, on the CPU
    lengths: Tensor  # [N] int, tokens so far, on the CPU


class Interrupt:
    """A `RolloutRequest.should_stop` that does not look at the progress, and may therefore be asked at any time.

    Args:
        requested: whether generation is to end now.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        self.requested = requested

    def __call__(self, progress: Progress) -> bool:
        return self.requested()


@dataclass
class RolloutRequest:
    """N completions to sample for B prompts.

    Attributes:
        prompts: the B prompts.
        group: ``[N]`` index of each completion's prompt.
        sample: ``[N]`` index of each completion within its group; with ``seed`` and the prompt's ``draw`` it
            determines the sampling noise at every position.
        sampling: how to draw tokens.
        seed: seed of the sampling noise.
        budgets: ``[N]`` tokens allowed in all for each completion (prefix included); None: ``sampling.max_tokens``.
        prefix: unfinished completions to continue: N rows in the order of ``group``; rows of length 0 start afresh.
        should_stop: called after each decode step; True interrupts generation, and unfinished rows come back with
            `StopReason.ABORTED`. An `Interrupt` need not be called that often.
        score: scores rollouts with the module's own rewards, for samplers that select.
        entropy: ask for the entropy of the sampling distribution at each position (token signal ``entropy``).
        wanted: groups that a training step needs. Then a sampler may return other prompts than the request's (drawn
            earlier, or chosen among them), as long as it returns that many groups; with None it returns exactly what
            was requested.
        noise: how the noise of a position becomes a token: ``"uniform"`` by inverting the distribution function,
            ``"gumbel"`` by the Gumbel-max trick, which makes two similar policies draw the same token most often. A
            sampler that cannot do the latter raises ``ValueError``.
        edits: what callbacks changed, as recorded by the dispatcher.
    """

    prompts: Prompts
    group: Tensor
    sample: Tensor
    sampling: Sampling
    seed: int
    budgets: Tensor | None = None
    prefix: Rollouts | None = None
    should_stop: Callable[[Progress], bool] | None = None
    score: Callable[[Rollouts], Rollouts] | None = None
    entropy: bool = True
    wanted: int | None = None
    noise: Literal["uniform", "gumbel"] = "uniform"
    edits: list[Edit] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.group)

    def clone(self) -> RolloutRequest:
        """A copy whose settings and tensors may be changed without touching this one (prompts are shared)."""
        budgets = None if self.budgets is None else self.budgets.clone()
        copied: dict[str, Any] = {"group": self.group.clone(), "sample": self.sample.clone(), "budgets": budgets}
        return replace(self, sampling=replace(self.sampling), edits=list(self.edits), **copied)

    def diff(self, before: RolloutRequest, skip: Collection[str] = ()) -> dict[str, int]:
        """Names of the settings that differ from ``before``, and in how many entries; those in ``skip`` left out."""
        changed: dict[str, int] = {}
        for name in ("group", "sample", "budgets"):
            new, old = getattr(self, name), getattr(before, name)
            if (new is None) != (old is None) or (new is not None and not torch.equal(new, old)):
                changed[name] = max(0 if x is None else len(x) for x in (new, old))
        for setting in fields(Sampling):
            if getattr(self.sampling, setting.name) != getattr(before.sampling, setting.name):
                changed[f"sampling.{setting.name}"] = 1
        for name in ("prompts", "prefix"):
            if getattr(self, name) is not getattr(before, name):
                changed[name] = len(self)
        changed |= {name: 1 for name in ("seed", "noise") if getattr(self, name) != getattr(before, name)}
        return {name: entries for name, entries in changed.items() if name not in skip}

    @classmethod
    def for_groups(
        cls, prompts: Prompts, group_size: int, sampling: Sampling, seed: int, **extra: Any
    ) -> RolloutRequest:
        """``group_size`` completions of each prompt, rows of one prompt together."""
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        return cls(prompts, group, occurrence(group), sampling, seed, **extra)


class RolloutSampler(ABC):
    """Generates completions. One instance belongs to one module; wrappers hold an inner sampler.

    The log-probabilities that a sampler returns (``logprobs.sampler``) are *processed*: after temperature and over the
    support that was sampled from. A sampler that shares the trainer's weights in its process sets ``in_process``: then
    the trainer may take them for its own where the support is full.

    Attributes:
        in_process: shares the trainer's weights (see above).
        carries_over: holds prompts or completions from one step to the next.
        selects: scores what it samples for a step (``RolloutRequest.score``) and returns a part of it.
        continues_prefix: can continue the completions in ``RolloutRequest.prefix``.
        provides: signals in every batch, such as ``"entropy"``, or ``"rewards"`` where an environment gives them.
        loss_correction: what the policy loss needs because of how this sampler works, if the method sets nothing.
    """

    in_process: bool = False
    carries_over: bool = False
    selects: bool = False
    continues_prefix: bool = True
    provides: frozenset[str] = frozenset({"logprobs.sampler"})
    loss_correction: OffPolicyCorrection | None = None

    def setup(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """Called once before the first request, on every rank, with the policy on its device."""
        self.model, self.tokenizer = model, tokenizer

    def check_setup(self, module: RLModule) -> None:  # noqa: B027
        """Raise ``ValueError`` with a sentence if this sampler cannot work with the module's settings."""

    def prompts_to_draw(self, wanted: int) -> int:
        """How many new prompts a request needs so that ``wanted`` groups can be returned."""
        return wanted

    @abstractmethod
    def submit(self, request: RolloutRequest) -> None:
        """Accept a request. At most one is in flight unless the sampler says otherwise."""

    @abstractmethod
    def collect(self) -> Rollouts:
        """The completions of the oldest request, as a batch with rows in the order of the request."""

    def sample(self, request: RolloutRequest) -> Rollouts:
        """`submit`, then `collect`."""
        self.submit(request)
        return self.collect()

    def next_token_logprobs(self, contexts: Sequence[Tensor], sampling: Sampling) -> Tensor:
        """The distribution from which this sampler would draw a token after each context.

        Args:
            contexts: n one-dimensional int tensors, prompt and completion so far.
            sampling: how tokens are drawn.

        Returns:
            ``[n, V]`` log-probabilities, processed.

        Raises:
            ValueError: this sampler cannot tell.
        """
        raise ValueError(f"{type(self).__name__} gives no distributions over the vocabulary: use HFSampler.")

    def sync(self, model: torch.nn.Module, version: int) -> None:
        """Take the policy's current weights; completions sampled from now on carry ``version``."""
        self.policy_version = version

    policy_version: int = 0

    def on_rewind(self, model: torch.nn.Module) -> None:  # noqa: B027
        """The policy went back to earlier weights: forget in-flight work that belongs to the abandoned future."""

    def boundary(self) -> Any:
        """What the step that begins may change, kept in memory; cheap, and nothing is finished for it."""
        return None

    def return_to(self, boundary: Any) -> None:  # noqa: B027
        """Undo a step that was interrupted: its prompts will be drawn again."""

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Numbers about the step that made this batch, logged as ``sampler/<name>`` (their mean over the ranks)."""
        return {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """While inside, the sampler owns the accelerator's memory (engines wake up and go to sleep here)."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """What the next request depends on; in-flight work is finished first, so that resume is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` returned."""

    def describe(self) -> str:
        """One line for the run header."""
        return type(self).__name__

    def close(self) -> None:  # noqa: B027
        """Release processes and memory."""
