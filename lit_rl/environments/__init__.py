# SPDX-License-Identifier: Apache-2.0
"""Environments that answer the policy between its turns: tools, games, simulated users."""

from lit_rl.environments.base import Environment, Episode, Observation, Turn
from lit_rl.environments.calculator import CalculatorEnvironment
from lit_rl.environments.gymnasium_text import GymnasiumEnvironment

__all__ = ["CalculatorEnvironment", "Environment", "Episode", "GymnasiumEnvironment", "Observation", "Turn"]
