# SPDX-License-Identifier: Apache-2.0
"""Text environments with the interface of Gymnasium (https://gymnasium.farama.org), which need not be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_rl.environments.base import Environment, Episode, Observation, Turn


class GymnasiumEnvironment(Environment):
    """Plays environments with ``reset(seed=…) -> (observation, info)`` and
    ``step(action) -> (observation, reward, terminated, truncated, info)``.

    The first observation follows the prompt, each turn of the policy is an action, rewards are summed. An episode that
    a budget cuts keeps what it has earned, 0 if that is nothing.

    Args:
        env: an id for ``gymnasium.make``, or a function that makes an environment.
        options: keyword arguments of either.
        columns: dataset columns that are passed to either as further keyword arguments (a task's number, say).
        role: send observations as chat messages of this role (``"user"``, ``"tool"``); None: as plain text.
        template: what an observation looks like, ``{}`` standing for it.
        to_text: turns an observation into text.
        to_action: turns the policy's text into an action.
    """

    gives_rewards = True

    def __init__(
        self,
        env: Callable[..., Any] | str,
        options: dict[str, Any] | None = None,
        columns: list[str] | None = None,
        role: str | None = None,
        template: str = "{}",
        to_text: Callable[[Any], str] = str,
        to_action: Callable[[str], Any] = str.strip,
    ) -> None:
        if "{}" not in template:
            raise ValueError(f"template must contain {{}}, which stands for the observation, got {template!r}.")
        self.env, self.options, self.columns = env, dict(options or {}), list(columns or ())
        self.role, self.template, self.to_text, self.to_action = role, template, to_text, to_action

    def start(self, record: dict[str, Any], seed: int) -> Episode:
        options = self.options | {name: record[name] for name in self.columns}
        return _Play(self, self.make(**options), seed)

    def make(self, **options: Any) -> Any:
        """A new environment."""
        if not isinstance(self.env, str):
            return self.env(**options)
        import gymnasium

        return gymnasium.make(self.env, **options)

    def show(self, observation: Any) -> Observation:
        """An observation as the policy sees it."""
        text = self.template.replace("{}", self.to_text(observation))
        return text if self.role is None else [{"role": self.role, "content": text}]


class _Play(Episode):
    def __init__(self, environment: GymnasiumEnvironment, env: Any, seed: int) -> None:
        self.environment, self.env, self.seed = environment, env, seed

    def opening(self) -> Observation:
        observation, _ = self.env.reset(seed=self.seed % 2**31)
        return self.environment.show(observation)

    def step(self, text: str) -> Turn:
        action = self.environment.to_action(text)
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return Turn(self.environment.show(observation), bool(terminated or truncated), float(reward))

    def cut(self) -> float | None:
        return 0.0

    def close(self) -> None:
        close = getattr(self.env, "close", None)
        if close is not None:
            close()
