# SPDX-License-Identifier: Apache-2.0
"""Sampling with vLLM in the trainer's process, on the real engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bench import KEPT_PROMISES, SHAPE, engine_bench
from extras import needs

from lit_rl.policies import Policy
from lit_rl.rollouts import StopReason
from lit_rl.samplers import HFSampler, PartialSampler, VLLMSampler
from lit_rl.samplers.agreement import DisagreementError
from lit_rl.samplers.vllm_weights import merged_weights
from lit_rl.testing import SAMPLER_PROMISES, SamplerBench, make_module, make_policy, train
from tests.learning.lesson import check_that_it_teaches

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
vllm = needs("vllm")


class Kept(VLLMSampler):
    """Survives the end of a bench: an engine takes seconds to build."""

    def close(self) -> None:
        self._pending.clear()


@pytest.fixture(scope="module")
def shared() -> Any:
    sampler = Kept({"max_model_len": 128})
    yield sampler
    VLLMSampler.close(sampler)


@pytest.fixture
def bench(shared: VLLMSampler, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with engine_bench(shared, tmp_path_factory.getbasetemp() / "vllm") as bench:
        yield bench


@pytest.mark.parametrize("name", KEPT_PROMISES)
def test_it_keeps_the_contract(name: str, bench: SamplerBench) -> None:
    SAMPLER_PROMISES[name](bench)


# Weights -------------------------------------------------------------------------------------------------------------


def test_the_version_has_what_weights_are_brought_with(shared: VLLMSampler, bench: SamplerBench) -> None:
    from lit_rl.samplers.vllm_weights import TESTED

    assert vllm.__version__.startswith(TESTED), f"tested with {TESTED}: look at vllm_weights.py before raising it"


def lora_policy(folder: Path) -> tuple[Any, Any]:
    make_policy(folder, **SHAPE, initializer_range=0.25, max_position_embeddings=128)
    from lit_rl.policies import LoRA

    model, tokenizer = Policy(str(folder), lora=LoRA(r=4)).load()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return model, tokenizer


def test_adapters_are_merged_exactly_and_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from lit_rl.policies.exporting import merge_adapter

    model, _ = lora_policy(tmp_path / "policy")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = dict(merged_weights(model))
    expected = dict(merge_adapter(model).named_parameters())
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name].detach())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_lora_and_untied_heads_reach_the_engine(tied: bool, tmp_path: Path) -> None:
    make_policy(tmp_path / "policy", **SHAPE, initializer_range=0.25, tie_word_embeddings=tied)
    model, tokenizer = lora_policy(tmp_path / "policy")
    sampler = VLLMSampler({"max_model_len": 64}, check_every=1)
    sampler.setup(model, tokenizer)
    with SamplerBench(HFSampler, tmp_path) as bench:
        request = bench.request()
    try:
        for version in range(2):
            sampler.sync(model, version)
            sampler.sample(request)
            assert sampler.agreement.gap is not None
            assert sampler.agreement.gap < 1e-4
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p) * p.requires_grad)
    finally:
        sampler.close()


def test_stale_weights_are_noticed(shared: VLLMSampler, bench: SamplerBench, monkeypatch: Any) -> None:
    """Without packing the head again, the CPU build goes on with the old one."""
    monkeypatch.setattr("lit_rl.samplers.vllm_weights.refresh_packed_copies", lambda model: None)
    monkeypatch.setattr(shared.agreement, "every", 1)
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    with torch.no_grad():
        for p in bench.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    bench.sampler.sync(bench.model, 1)
    with pytest.raises(DisagreementError, match="Kept differ from the policy's own by"):
        bench.sample()
    with torch.no_grad():
        for name, p in bench.model.named_parameters():
            p.copy_(before[name])


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_failed_engine_is_built_anew_and_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    make_policy(tmp_path / "policy", **SHAPE, initializer_range=0.25, max_position_embeddings=128)
    with SamplerBench(lambda: VLLMSampler({"max_model_len": 128}, max_restarts=1), tmp_path) as bench:
        expected = bench.sample()
        sampler: Any = bench.sampler
        steps = 0
        step = sampler.engine.step

        def fails_at_the_fourth() -> Any:
            nonlocal steps
            steps += 1
            if steps == 4:
                raise RuntimeError("the engine died")
            return step()

        sampler.engine.step = fails_at_the_fourth
        bench.assert_same(expected, bench.sample())
        assert sampler.restarts == 1
        assert sampler.metrics(expected)["restarts"] == 1
        monkeypatch.setattr(type(sampler.engine), "step", lambda self: 1 / 0)
        with pytest.raises(RuntimeError, match=r"failed 2 times \(max_restarts=1\), the last time with ZeroDivision"):
            bench.sample()


def test_an_engine_that_never_worked_is_not_tried_again(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")  # heads of 16 dimensions
    with (
        SamplerBench(lambda: VLLMSampler({"max_model_len": 64}), tmp_path) as bench,
        pytest.raises(RuntimeError, match="head_dim=16"),
    ):
        bench.sample()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_restarts": -1}, "max_restarts must not be negative"),
        ({"check_every": -1}, "check_every must be 0"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VLLMSampler(**arguments)


def test_what_an_engine_cannot_do_is_refused(bench: SamplerBench) -> None:
    with pytest.raises(ValueError, match="need 201 positions, but the engine has only 128"):
        bench.sample(max_tokens=200)
    request = bench.request()
    request.prompts.model_inputs = {"pixels": [None] * 4}
    with pytest.raises(ValueError, match=r"further inputs \(pixels\) cannot be sent"):
        bench.sample(request)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_it_trains_with_a_correction_and_as_the_inside_of_partial_rollouts(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy", **SHAPE, max_position_embeddings=128)
    for sampler in (VLLMSampler({"max_model_len": 64}), PartialSampler(VLLMSampler({"max_model_len": 64}))):
        module = make_module(str(policy), max_rollouts=3, sampler=sampler)
        train(tmp_path, module)
        assert module.clock == 3
        rollouts = module.last_rollouts
        assert rollouts is not None
        assert not bool((rollouts.row["stop_reason"] == StopReason.ABORTED).any())
        assert module.numbers is not None


def test_a_policy_learns_as_with_the_built_in_sampler(shared: VLLMSampler, tmp_path: Path) -> None:
    check_that_it_teaches(shared, tmp_path, **SHAPE)
