# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the samplers' tests."""

from typing import Any

import pytest
from sampler_models import character_tokenizer, tiny_model

__all__ = ["tiny_model"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return character_tokenizer()
