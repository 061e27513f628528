# SPDX-License-Identifier: Apache-2.0
"""Engines that are not installed everywhere: tests skip without them, except where they must be there."""

import importlib
import os
from types import ModuleType

import pytest

REQUIRED = "LIT_RL_REQUIRE_EXTRAS"  # names of packages, separated by commas; continuous integration sets it


def needs(name: str) -> ModuleType:
    """The package, or a skip of the whole test file; a failure if the environment says that it must be there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if name in os.environ.get(REQUIRED, "").split(","):
            pytest.fail(f"{name} must be installed here ({REQUIRED}), and its import failed: {error}")
        pytest.skip(f"{name} is not installed", allow_module_level=True)
