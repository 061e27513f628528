# SPDX-License-Identifier: Apache-2.0
"""Sampling from a copy in low precision: its weights are the rounded ones of the policy, at every sync."""

from importlib.util import find_spec

import pytest
import torch
from sampler_models import largest_gap, request, tiny_model

from lit_rl.policies import LoRA
from lit_rl.policies.exporting import merge_adapter
from lit_rl.policies.rounding import rounded
from lit_rl.samplers import HFSampler, LowPrecisionSampler
from lit_rl.samplers.low_precision import quantised_layers


def connected(model, tokenizer, kind, **options) -> LowPrecisionSampler:
    sampler = LowPrecisionSampler(HFSampler(), kind, **options)
    sampler.setup(model, tokenizer)
    sampler.sync(model, 3)
    return sampler


@pytest.mark.parametrize("kind", ["nf4-rounded", "fp4-rounded", "int8-rounded", "bfloat16"])
def test_the_copy_has_the_rounded_weights_after_every_sync(tokenizer, kind):
    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    sampler = connected(model, tokenizer, kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    sampler.sync(model, 4)
    layers = [f"{name}.weight" for name in quantised_layers(model, ["lm_head"])]
    assert len(layers) == 14
    for name, parameter in sampler.copy.named_parameters():
        own = dict(model.named_parameters())[name]
        expected = own
        if kind == "bfloat16":
            expected = own.bfloat16()
        elif name in layers:
            expected = rounded(own, kind.removesuffix("-rounded"))
            assert not torch.equal(expected, own)
        assert torch.equal(parameter, expected), name
        assert not parameter.requires_grad
    out = sampler.sample(request())
    assert (out.token["policy_version"][out.completion_mask] == 4).all()


def test_log_probabilities_are_those_of_the_copy(tokenizer):
    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    sampler = connected(model, tokenizer, "nf4-rounded")
    out = sampler.sample(request())
    assert largest_gap(sampler.copy, out) < 1e-4
    assert largest_gap(model, out) > 0.05, "the policy is another one"
    assert not sampler.in_process
    contexts = [torch.tensor([5, 9]), torch.tensor([7, 8, 3, 4])]
    found = sampler.next_token_logprobs(contexts, request().sampling)
    with torch.no_grad():
        for context, logprobs in zip(contexts, found):
            own = sampler.copy(input_ids=context[None]).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(logprobs, own, atol=1e-4, rtol=0)


def test_the_policy_is_left_alone_and_skipped_modules_are_exact(tokenizer):
    model = tiny_model("Qwen2", vocab_size=len(tokenizer)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sampler = connected(model, tokenizer, "nf4-rounded", skip=["lm_head", "down_proj"])
    sampler.sample(request())
    assert model.training
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    exact = {n for n, p in sampler.copy.named_parameters() if torch.equal(p, before[n])}
    assert all(n in exact for n in before if "down_proj" in n)
    assert not any(n in exact for n in before if "up_proj" in n)


def test_adapters_are_merged_into_the_copy(tokenizer):
    pytest.importorskip("peft")
    model = LoRA(r=2, alpha=8).apply(tiny_model("Qwen2", vocab_size=len(tokenizer)))
    sampler = connected(model, tokenizer, "int8-rounded")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    sampler.sync(model, 4)
    merged = dict(merge_adapter(model).named_parameters())
    for name, parameter in sampler.copy.named_parameters():
        expected = merged[name]
        if f"{name}".removesuffix(".weight") in quantised_layers(sampler.copy, ["lm_head"]):
            expected = rounded(expected, "int8")
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes_sample_as_the_rounded_weights_do(tokenizer, kind):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}
    model = tiny_model("Qwen2", vocab_size=len(tokenizer), **sizes)
    sampler, simulated = connected(model, tokenizer, kind), connected(model, tokenizer, f"{kind}-rounded")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    sampler.sync(model, 4)
    simulated.sync(model, 4)
    layer = sampler.copy.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    out = sampler.sample(request(max_tokens=6))
    # On CPUs with bfloat16 instructions bitsandbytes also rounds what it multiplies.
    assert largest_gap(simulated.copy, out) < 0.3 * largest_gap(model, out)


def test_layers_that_the_kernels_refuse_keep_their_precision(tokenizer):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
    sampler = connected(tiny_model("Qwen2", vocab_size=len(tokenizer), **sizes), tokenizer, "nf4")
    mlp = sampler.copy.model.layers[0].mlp
    assert mlp.up_proj.weight.dtype == torch.uint8
    assert mlp.down_proj.weight.dtype == torch.float32  # 96 inputs are no whole number of blocks
    assert len(sampler.sample(request(max_tokens=4))) == len(request())


class RoundingLinear(torch.nn.Module):
    """A layer of whole numbers that rounds its inputs, differently for every batch as kernels do."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = 1 + 0.01 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
        return torch.nn.functional.linear(x * noise, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantised_layers_that_round_their_inputs_are_not_taken_for_a_mismatch(tokenizer):
    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    for layer in model.model.layers:
        layer.mlp.up_proj = RoundingLinear(layer.mlp.up_proj)
    sampler = HFSampler(fallback="error")  # refuses to decode in a slow way
    sampler.setup(model, tokenizer)
    assert len(sampler.sample(request())) == len(request())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="kind must be one of nf4"):
        LowPrecisionSampler(kind="int2")
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="kind=nf4-rounded, which samples the same way"):
            LowPrecisionSampler(kind="nf4")
