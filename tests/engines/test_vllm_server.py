# SPDX-License-Identifier: Apache-2.0
"""Sampling with a vLLM server, on a real one that the test starts."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bench import KEPT_PROMISES, SHAPE, engine_bench
from extras import needs

from lit_rl.samplers import VLLMServerSampler
from lit_rl.samplers.agreement import DisagreementError
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench, make_module, make_policy, train
from tests.learning.lesson import check_that_it_teaches

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
needs("vllm")

SERVER = ["--max-model-len", "128", "--enforce-eager"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Kept(VLLMServerSampler):
    """Survives the end of a bench: a server takes seconds to start."""

    def close(self) -> None:
        self._pending.clear()


@pytest.fixture(scope="module")
def shared() -> Any:
    sampler = Kept(f"http://127.0.0.1:{free_port()}", api_key="secret", start=True, arguments=SERVER, check_every=1)
    yield sampler
    VLLMServerSampler.close(sampler)


@pytest.fixture
def bench(shared: VLLMServerSampler, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with engine_bench(shared, tmp_path_factory.getbasetemp() / "vllm-server") as bench:
        yield bench


@pytest.mark.parametrize("name", KEPT_PROMISES)
def test_it_keeps_the_contract(name: str, bench: SamplerBench) -> None:
    SAMPLER_PROMISES[name](bench)


# Weights and failures ------------------------------------------------------------------------------------------------


def test_stale_weights_are_noticed(bench: SamplerBench, shared: VLLMServerSampler, monkeypatch: Any) -> None:
    """A server that takes the version and not the weights."""
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    write = shared._load
    with torch.no_grad():
        for p in bench.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    bench.sampler.sync(bench.model, 1)
    with torch.no_grad():
        for name, p in bench.model.named_parameters():
            p.copy_(before[name])
    with pytest.raises(DisagreementError, match="Kept differ from the policy's own by"):
        bench.sample()
    write()


def kill(sampler: VLLMServerSampler) -> None:
    assert sampler._process is not None
    os.killpg(sampler._process.pid, signal.SIGKILL)
    sampler._process.wait()


def test_a_killed_server_is_started_again_and_nothing_is_lost(bench: SamplerBench, shared: Any) -> None:
    request = bench.request([0, 1, 2, 3] * 8, max_tokens=100, stop_token_ids=[])
    expected, before = bench.sample(request), shared.restarts
    threading.Timer(0.15, kill, [shared]).start()
    found = bench.sample(request)
    while shared.restarts == before:  # the timer was late: the next batch meets the dead server
        found = bench.sample(request)
    bench.assert_same(expected, found)
    assert shared.restarts == before + 1
    shared.agreement.synced()
    bench.sample()  # the new server has the policy's weights: the comparison says so
    assert shared.agreement.gap < 1e-3


def test_a_server_that_forgot_the_weights_gets_them_again(bench: SamplerBench, shared: Any) -> None:
    """As a foreign server that was restarted by somebody else."""
    from lit_rl.serving import run

    expected, before = bench.sample(), shared.restarts

    async def forget() -> None:
        async with shared.client.session() as session:
            file = next(shared._weights_folder().glob("*.safetensors"))
            await shared.client.ask_workers(session, "lit_rl_load", str(file), "another")

    run(forget())
    bench.assert_same(expected, bench.sample())
    assert shared.restarts == before + 1
    shared.restarts = 0


def test_a_wrong_key_is_explained(bench: SamplerBench, shared: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(shared.client, "headers", {"Authorization": "Bearer wrong"})
    with pytest.raises(ValueError, match="wants an API key: set api_key"):
        bench.sample()


def test_a_server_that_fails_too_often_ends_the_run(bench: SamplerBench, shared: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(shared, "max_restarts", 0)
    monkeypatch.setattr(shared, "restarts", 0)
    monkeypatch.setattr(shared, "_stamp", "never")
    with pytest.raises(
        RuntimeError, match=r"failed 1 times \(max_restarts=0\), the last time with ServerGone: it was restarted"
    ):
        bench.sample()


def test_it_scores_as_a_teacher(bench: SamplerBench, shared: Any) -> None:
    from lit_rl.policies import Served

    out = bench.sample()
    served = Served(shared.client.url, api_key="secret")
    served.check_vocabulary(bench.model, bench.tokenizer)
    found = served.score(bench.model, out, lambda rollouts, model: torch.zeros(0), temperature=1.0)
    torch.testing.assert_close(found, out.logprobs["sampler"], atol=1e-4, rtol=0)


def test_a_run_trains_with_it(bench: SamplerBench, shared: Any, tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy", **SHAPE, max_position_embeddings=128)
    module = make_module(str(policy), max_rollouts=3, sampler=shared)
    train(tmp_path, module)
    assert module.clock == 3
    assert module.last_rollouts is not None
    assert float((module.last_rollouts.logprobs["sampler"] != 0).float().mean()) > 0


def test_a_policy_learns_as_with_the_built_in_sampler(shared: VLLMServerSampler, tmp_path: Path) -> None:
    check_that_it_teaches(shared, tmp_path, **SHAPE)
