# SPDX-License-Identifier: Apache-2.0
"""Rewards and verifiers: they turn completions into named numbers, NaN where a completion cannot be scored.

Names are loaded when first used: the worker processes of `VerifierPool` import this package and do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_rl.rewards.base import Reward, RewardExample, RewardInput, RewardSelfTestError, RewardSetupError
    from lit_rl.rewards.combine import check_rewards, score_rewards, verdict, weighted_sum
    from lit_rl.rewards.function import FunctionReward
    from lit_rl.rewards.gym import ReasoningGymReward
    from lit_rl.rewards.math import MathReward
    from lit_rl.rewards.model import RewardModelReward
    from lit_rl.rewards.pool import Outcome, VerifierPool
    from lit_rl.rewards.rows import PerRowReward
    from lit_rl.rewards.text import ExactMatchReward, FormatReward, LengthReward, OverlongReward, RepetitionReward

_EXPORTS = {
    "ExactMatchReward": "text",
    "FormatReward": "text",
    "FunctionReward": "function",
    "LengthReward": "text",
    "MathReward": "math",
    "Outcome": "pool",
    "OverlongReward": "text",
    "PerRowReward": "rows",
    "ReasoningGymReward": "gym",
    "RepetitionReward": "text",
    "Reward": "base",
    "RewardExample": "base",
    "RewardInput": "base",
    "RewardModelReward": "model",
    "RewardSelfTestError": "base",
    "RewardSetupError": "base",
    "VerifierPool": "pool",
    "check_rewards": "combine",
    "score_rewards": "combine",
    "verdict": "combine",
    "weighted_sum": "combine",
}

__all__ = [
    "ExactMatchReward",
    "FormatReward",
    "FunctionReward",
    "LengthReward",
    "MathReward",
    "Outcome",
    "OverlongReward",
    "PerRowReward",
    "ReasoningGymReward",
    "RepetitionReward",
    "Reward",
    "RewardExample",
    "RewardInput",
    "RewardModelReward",
    "RewardSelfTestError",
    "RewardSetupError",
    "VerifierPool",
    "check_rewards",
    "score_rewards",
    "verdict",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
