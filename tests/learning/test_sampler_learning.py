# SPDX-License-Identifier: Apache-2.0
"""A policy learns with each sampler as it does with the built-in one. Those with an engine: tests/engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rl.samplers import (
    AsyncSampler,
    HFSampler,
    LowPrecisionSampler,
    PartialSampler,
    RolloutSampler,
    TwoStageSampler,
)
from tests.learning.lesson import check_that_it_teaches

pytestmark = pytest.mark.learning

SAMPLERS: dict[str, Callable[[], RolloutSampler]] = {
    "partial": lambda: PartialSampler(HFSampler(), oversampling=2.0, correction="truncated"),
    "async": lambda: AsyncSampler(HFSampler(), staleness=1, worker="thread"),
    "two stages": lambda: TwoStageSampler(LowPrecisionSampler(kind="nf4-rounded"), HFSampler(), pool_size=16),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_policy_learns_as_with_the_built_in_sampler(tmp_path: Path, name: str):
    check_that_it_teaches(SAMPLERS[name](), tmp_path)
