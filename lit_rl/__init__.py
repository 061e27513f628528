# SPDX-License-Identifier: Apache-2.0
"""lit-rl: reinforcement-learning post-training and distillation of language models on PyTorch Lightning.

Importing the package is cheap: names are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Prompts": "rollouts",
    "Batch": "rollouts",
    "Rollouts": "rollouts",
    "Origin": "rollouts",
    "StopReason": "rollouts",
    "RolloutCallback": "hooks",
    "RLModule": "methods.module",
    "GRPO": "methods.grpo",
    "SFT": "methods.sft",
    "OPD": "methods.opd",
    "OPSD": "methods.opsd",
    "RLSD": "methods.rlsd",
    "GOPD": "methods.gopd",
    "KDRL": "methods.kdrl",
    "RLAD": "methods.rlad",
    "Policy": "policies",
    "LoRA": "policies",
    "Sampling": "samplers",
    "HFSampler": "samplers",
    "RolloutSampler": "samplers",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
