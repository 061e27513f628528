# SPDX-License-Identifier: Apache-2.0
"""Every family of models: how it is decoded, and that it comes out as from a plain forward and from `generate`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from sampler_models import THREE, connected, full_logits, largest_gap, request, tiny_model

from lit_rl.rollouts import StopReason
from lit_rl.samplers import HFSampler, fast_decode

DECODERS = {
    "Qwen2": "FastDecoder",
    "Qwen3": "FastDecoder",
    "Llama": "FastDecoder",
    "Mistral": "FastDecoder",
    "GPT2": "ModelDecoder",
    "Gemma2": "ModelDecoder",
    "Gemma3": "ModelDecoder",
    "Lfm2": "NativeCacheDecoder",
    "Mamba": "RecomputeDecoder",
}


@pytest.fixture(scope="module", params=DECODERS)
def family(request: pytest.FixtureRequest) -> tuple[str, Any, HFSampler]:
    model = tiny_model(request.param, vocab_size=47)  # as many as the tokenizer has
    return request.param, model, connected(model)


Family = tuple[str, Any, HFSampler]


def test_the_fastest_decoder_that_agrees_is_chosen(family: Family) -> None:
    name, _, sampler = family
    assert type(sampler.decoder).__name__ == DECODERS[name]
    assert DECODERS[name] in sampler.describe()


def test_log_probabilities_equal_a_full_forward(family: Family) -> None:
    _, model, sampler = family
    out = sampler.sample(request(max_tokens=20))
    assert int(out.lengths.max()) > 10  # beyond the windows of the sliding layers
    assert largest_gap(model, out) < 2e-5


def test_entropies_equal_a_full_forward(family: Family) -> None:
    _, model, sampler = family
    out = sampler.sample(request())
    for row, logits in enumerate(full_logits(model, out)):
        logp = logits.log_softmax(-1)
        expected = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(out.token["entropy"][row, : len(logits)], expected, rtol=1e-5, atol=2e-5)


def test_greedy_equals_generate(family: Family) -> None:
    """The library's own loop, a prompt at a time."""
    _, model, sampler = family
    out = sampler.sample(request(1, max_tokens=20, temperature=0.0))
    for prompt, ids in zip(THREE, out.completions(), strict=True):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        theirs = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert ids == theirs[0, len(prompt) :].tolist()


def test_an_interrupted_completion_goes_on_token_for_token(family: Family) -> None:
    _, _, sampler = family
    whole = sampler.sample(request(max_tokens=14))
    part = sampler.sample(request(max_tokens=14, should_stop=lambda p: p.step >= 5))
    assert bool((part.row["stop_reason"] == StopReason.ABORTED).any())
    again = sampler.sample(request(max_tokens=14, prefix=part))
    assert again.completions() == whole.completions()
    torch.testing.assert_close(again.logprobs["sampler"], whole.logprobs["sampler"], rtol=1e-5, atol=2e-5)


def test_prompts_longer_than_the_window_are_decoded_right() -> None:
    """Both alone and beside a short prompt, whose padding then fills the window."""
    for name in ("Mistral", "Gemma2", "Gemma3"):
        model = tiny_model(name)
        sampler = connected(model)
        long, short = list(range(3, 33)), [7]
        for texts in ([long], [long, short]):
            out = sampler.sample(request(2, texts=texts))
            assert largest_gap(model, out) < 2e-5


def test_qwen2_with_a_window_in_some_layers_only() -> None:
    model = tiny_model(
        "Qwen2", use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    )
    sampler = connected(model)
    assert type(sampler.decoder).__name__ == "FastDecoder"
    assert largest_gap(model, sampler.sample(request(max_tokens=20))) < 2e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"num_key_value_heads": 4}),
        ("Mistral", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": None}),
        ("Qwen3", {"head_dim": 24, "attention_bias": True}),
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_fast_way_knows_the_variants_of_its_layers(
    name: str, changes: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, head counts, activations and rotations; with fused weights as for small models, and without."""
    monkeypatch.setattr(fast_decode, "_FUSE_BELOW", 64_000_000 if fused else 0)
    model = tiny_model(name, **changes)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    sampler = connected(model)
    assert type(sampler.decoder).__name__ == "FastDecoder"
    assert largest_gap(model, sampler.sample(request(max_tokens=20))) < 3e-5


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_longest_row_are_left_to_the_model(rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 256}
        parameters |= factors
    sampler = connected(tiny_model("Llama", rope_parameters=parameters))
    assert type(sampler.decoder).__name__ == "ModelDecoder"


def test_a_slow_way_is_taken_with_a_warning_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        connected(tiny_model("Mamba"))
    assert "decodes MambaForCausalLM in a slow way (RecomputeDecoder): it keeps a recurrent state" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        connected(tiny_model("Qwen2"))
    assert not caplog.text
    with pytest.raises(ValueError, match="only a slow way for Lfm2ForCausalLM: it has layers of type conv"):
        connected(tiny_model("Lfm2"), fallback="error")


def test_a_model_whose_cache_disagrees_with_its_forward_is_recomputed(caplog: pytest.LogCaptureFixture) -> None:
    """Found by trying, not by name: here the cached values are wrong."""
    model: Any = tiny_model("GPT2")
    original = type(model).forward

    class Odd(type(model)):
        @functools.wraps(original)  # the signature is looked at
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            grown = past_key_values is not None and past_key_values.get_seq_length() > 0
            out = original(self, *args, past_key_values=past_key_values, **kwargs)
            out.logits = out.logits.flip(-1) if grown else out.logits
            return out

    model.__class__ = Odd
    with caplog.at_level("WARNING"):
        sampler = connected(model)
    assert type(sampler.decoder).__name__ == "RecomputeDecoder"
    assert "differ from a plain forward" in caplog.text
    assert largest_gap(model, sampler.sample(request())) < 2e-5


def test_what_is_no_causal_language_model_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with pytest.raises(ValueError, match="needs a transformers causal language model, got Linear"):
        connected(torch.nn.Linear(2, 2))
    sizes = {"vocab_size": 48, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="encoder-decoder"):
        connected(T5ForConditionalGeneration(T5Config(**sizes)))
