# SPDX-License-Identifier: Apache-2.0
"""The bench of the sampler contract on a policy that vLLM's CPU build can run, with an engine that tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_rl.samplers import RolloutSampler
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench, make_policy

SHAPE: dict[str, Any] = {"num_heads": 1, "num_kv_heads": 1}  # heads of 32 dimensions, the least for vLLM on a CPU
# The others: a completion that an engine continues goes on with fresh noise.
KEPT_PROMISES = [
    name for name in SAMPLER_PROMISES if name not in ("a_prefix_is_continued", "an_interrupted_request_is_continued")
]


@contextmanager
def engine_bench(sampler: RolloutSampler, folder: Path) -> Iterator[SamplerBench]:
    """The sampler on the bench; ``close`` of a shared one must leave its engine alone."""
    make_policy(folder / "policy", **SHAPE, initializer_range=0.25, max_position_embeddings=128)
    with SamplerBench(lambda: sampler, folder, tolerance=1e-3) as bench:
        yield bench
