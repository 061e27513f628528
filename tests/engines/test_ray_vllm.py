# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in Ray actors: the same promises, from another process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from extras import needs

from lit_rl.samplers import RaySampler, RolloutRequest, Sampling, VLLMSampler
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench, make_policy

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
ray = needs("ray")
needs("vllm")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerBench]:
    folder = tmp_path_factory.mktemp("ray-vllm")
    shape = {"num_heads": 1, "num_kv_heads": 1}  # heads of 32 dimensions, the least for vLLM on a CPU
    make_policy(folder / "policy", **shape, initializer_range=0.25, max_position_embeddings=128)
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    engine = VLLMSampler({"max_model_len": 128}, check_every=1)
    with SamplerBench(lambda: RaySampler(engine, workers=1), folder, tolerance=1e-3) as bench:
        yield bench
    ray.shutdown()


@pytest.mark.parametrize(
    "name",
    [
        "rows_are_those_of_the_request",
        "every_signal_is_there",
        "log_probabilities_are_those_of_the_policy",
        "the_seed_decides",
        "budgets_bound_each_row",
        "should_stop_interrupts",
        "sync_brings_the_new_weights",
        "a_step_gets_its_groups",
    ],
)
def test_promises_are_kept_in_another_process(bench: SamplerBench, name: str) -> None:
    SAMPLER_PROMISES[name](bench)


def test_the_engine_s_numbers_and_its_correction_are_the_run_s(bench: SamplerBench) -> None:
    """It compared its log-probabilities with those of the weights that it was sent."""
    bench.sampler.sync(bench.model, bench.version)
    bench.sampler.metrics(bench.sample())  # begins to count anew
    request = RolloutRequest.for_groups(bench.prompts(), 3, Sampling(max_tokens=12), 0, wanted=4)
    numbers = bench.sampler.metrics(bench.sampler.sample(request))
    assert 0 <= numbers["logprob_gap"] < 1e-3
    assert numbers["units"] == 2
    assert bench.sampler.loss_correction == VLLMSampler().loss_correction
