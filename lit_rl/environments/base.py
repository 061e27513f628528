# SPDX-License-Identifier: Apache-2.0
"""What an environment promises: it reads what the policy wrote and answers, until the episode is over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

Observation = str | list[dict[str, str]]
"""Text that follows the policy's own directly, or chat messages that go through the tokenizer's chat template."""


class Turn(NamedTuple):
    """An environment's answer to one turn of the policy.

    Attributes:
        observation: what the policy reads next; ignored if the episode is done.
        done: whether the episode is over.
        reward: added to the episode's reward; None if the environment has none to give.
    """

    observation: Observation = ""
    done: bool = False
    reward: float | None = None


class Episode(ABC):
    """One conversation with the policy."""

    def opening(self) -> Observation:
        """What the policy reads after its prompt, before its first turn; nothing by default."""
        return ""

    @abstractmethod
    def step(self, text: str) -> Turn:
        """Answer the policy's newest turn (decoded, without special tokens)."""

    def cut(self) -> float | None:
        """A budget of tokens or turns ended the episode before it was done: the reward for that, if there is one."""
        return None

    def close(self) -> None:  # noqa: B027
        """Release what the episode holds; called once, also after a failure."""


class Environment(ABC):
    """Starts episodes. It and its episodes are called from several threads, but an episode only from one at a time.

    Attributes:
        stop: strings that end a turn of the policy, besides those of the sampling settings (a tool call's closing tag).
        gives_rewards: whether `Turn.reward` is ever set.
    """

    stop: Sequence[str] = ()
    gives_rewards: bool = False

    @abstractmethod
    def start(self, record: dict[str, Any], seed: int) -> Episode:
        """Begin an episode.

        Args:
            record: the prompt's ``prompt`` (as the policy sees it), ``source``, ``uid`` and all dataset columns.
            seed: the same whenever this completion of this prompt is sampled again.
        """
