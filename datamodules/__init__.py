# SPDX-License-Identifier: Apache-2.0
"""Sources of prompts: one Lightning datamodule a file."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ArithmeticDataModule": "arithmetic",
    "ArithmeticDemonstrations": "arithmetic",
    "EvalSource": "sources",
    "GSM8KDataModule": "gsm8k",
    "MATHDataModule": "math",
    "MixtureDataModule": "mixture",
    "ReasoningGymDataModule": "reasoning_gym",
    "Source": "sources",
    "TextDataModule": "text",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
