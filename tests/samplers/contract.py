# SPDX-License-Identifier: Apache-2.0
"""The contract of samplers as tests, a test for each promise of the public kit.

In the test file of a sampler::

    test_keeps_the_contract = contract(lambda: MySampler(HFSampler()))
"""

from collections.abc import Callable, Collection

import pytest

from lit_rl.samplers import RolloutSampler
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench


def contract(factory: Callable[[], RolloutSampler], without: Collection[str] = ()) -> Callable[..., None]:
    """A test function for every promise but those in ``without``; the policy on disk is shared by all tests."""

    @pytest.mark.parametrize("name", [name for name in SAMPLER_PROMISES if name not in without])
    def test(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        with SamplerBench(factory, tmp_path_factory.getbasetemp() / "contract") as bench:
            SAMPLER_PROMISES[name](bench)

    return test
