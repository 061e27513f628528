# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of completions against the model's own full logits, one row at a time."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, tiny
from torch import Tensor, nn

from lit_rl.policies import scoring
from lit_rl.policies.scoring import completion_logprobs, find_head, verify_head

LENGTHS = torch.tensor([9, 0, 4, 6])


@pytest.fixture
def qwen() -> Any:
    return tiny("qwen2")


def batch() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Four completions: prompts of 1 to 7 tokens, one completion empty, two tool tokens in the last."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=g) for n in (1, 5, 7, 3)]
    ids = torch.randint(3, VOCAB, (4, 9), generator=g)
    mask = (torch.arange(9) < LENGTHS[:, None]).long()
    mask[3, 2:4] = 0
    return prompts, ids, mask, LENGTHS


def naive(model: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Row by row, unpadded, through the model's own logits."""
    prompts, ids, mask, lengths = batch()
    dtype = next(model.parameters()).dtype
    logprobs, entropies = torch.zeros(4, 9, dtype=dtype), torch.zeros(4, 9, dtype=dtype)
    for i, n in enumerate(lengths.tolist()):
        sequence = torch.cat([prompts[i], ids[i, :n]])
        logp = torch.log_softmax(model(input_ids=sequence[None]).logits[0] / temperature, -1)
        for t in range(n):
            if mask[i, t]:
                at = logp[len(prompts[i]) + t - 1]
                logprobs[i, t] = at[ids[i, t]]
                entropies[i, t] = -(at.exp() * at).sum()
    return logprobs, entropies


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_logits(family: str, attn: str) -> None:
    model = tiny(family, attn)
    logprobs, entropies = completion_logprobs(model, *batch(), temperature=0.8, entropy=True)
    reference, reference_entropies = naive(model, 0.8)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, reference_entropies, rtol=1e-5, atol=1e-5)


# The norms of some families round to float32 whatever the type of the weights.
@pytest.mark.parametrize(("family", "tolerance"), [("qwen2", 1e-9), ("gpt2", 1e-9), ("gemma2", 1e-5), ("cohere", 1e-5)])
def test_gradients_equal(family: str, tolerance: float) -> None:
    model = tiny(family, dtype=torch.float64)
    upstream = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = []
    for outputs in (completion_logprobs(model, *batch(), temperature=0.8, entropy=True), naive(model, 0.8)):
        grads.append(torch.autograd.grad((torch.stack(outputs) * upstream).sum(), list(model.parameters())))
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_padding_does_not_matter() -> None:
    model = tiny("qwen2", dtype=torch.float64)
    prompts, ids, mask, lengths = batch()
    reference, _ = completion_logprobs(model, prompts, ids, mask, lengths)
    rounded, _ = completion_logprobs(model, prompts, ids, mask, lengths, pad_to_multiple_of=32, pad_token_id=7)
    torch.testing.assert_close(rounded, reference, rtol=1e-12, atol=1e-12)
    wide, _ = completion_logprobs(
        model, prompts, nn.functional.pad(ids, (0, 5), value=3), nn.functional.pad(mask, (0, 5), value=1), lengths
    )
    torch.testing.assert_close(wide[:, :9], reference, rtol=1e-12, atol=1e-12)
    assert wide[:, 9:].abs().max() == 0  # beyond the lengths, although the mask says 1


def test_width_is_rounded_and_the_last_token_is_not_fed(monkeypatch: pytest.MonkeyPatch, qwen: Any) -> None:
    widths = []
    original = scoring._backbone
    monkeypatch.setattr(scoring, "_backbone", lambda m, ids, kw: (widths.append(ids.shape), original(m, ids, kw))[1])
    verify_head(qwen)
    scoring._verified.add(qwen)
    widths.clear()
    completion_logprobs(qwen, *batch())
    completion_logprobs(qwen, *batch(), pad_to_multiple_of=8)
    assert widths == [(3, 10), (3, 16)]  # rows: the empty completion is left out; 7 prompt tokens + 4 - 1


def test_row_order_does_not_matter() -> None:
    model = tiny("gemma2", dtype=torch.float64)
    prompts, ids, mask, lengths = batch()
    reference, _ = completion_logprobs(model, prompts, ids, mask, lengths)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, _ = completion_logprobs(model, [prompts[i] for i in order], ids[order], mask[order], lengths[order])
    torch.testing.assert_close(shuffled, reference[order], rtol=1e-12, atol=1e-12)


def test_shared_prompts(qwen: Any) -> None:
    prompts, ids, mask, lengths = batch()
    index = torch.tensor([2, 2, 0, 3])
    shared, _ = completion_logprobs(qwen, prompts, ids, mask, lengths, prompt_index=index)
    repeated, _ = completion_logprobs(qwen, [prompts[i] for i in index], ids, mask, lengths)
    assert torch.equal(shared, repeated)


def test_wanted_positions_only(qwen: Any) -> None:
    prompts, ids, mask, lengths = batch()
    reference, _ = completion_logprobs(qwen, prompts, ids, torch.ones_like(mask), lengths)
    wanted = torch.zeros(4, 9, dtype=torch.bool)
    wanted[0, 3] = wanted[3, 2] = wanted[1, 0] = True  # the last one lies beyond its length
    some, _ = completion_logprobs(qwen, prompts, ids, mask, lengths, wanted=wanted)
    expected = torch.zeros(4, 9)
    expected[0, 3], expected[3, 2] = reference[0, 3], reference[3, 2]
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)


def test_nothing_wanted_still_back_propagates(qwen: Any) -> None:
    prompts, ids, mask, lengths = batch()
    logprobs, entropies = completion_logprobs(qwen, prompts, ids, mask * 0, lengths, entropy=True)
    assert logprobs.abs().max() == entropies.abs().max() == 0
    logprobs.sum().backward()
    empty, _ = completion_logprobs(qwen, prompts, ids[:, :0], mask[:, :0], lengths * 0)
    assert empty.shape == (4, 0)


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny("qwen2", dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        completion_logprobs(model, *batch())[0].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_close_to_float64() -> None:
    logprobs, _ = completion_logprobs(tiny("qwen2", dtype=torch.bfloat16), *batch())
    reference, _ = naive(tiny("qwen2", dtype=torch.float64))
    assert logprobs.dtype == torch.float32
    assert (logprobs.double() - reference).abs().mean() < 0.1


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("qwen2", dtype=torch.float64, tie_word_embeddings=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model = model.double().eval()
    assert (find_head(model).weight is None) == ("lm_head" in targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    ours = completion_logprobs(model, *batch(), temperature=0.8, entropy=True, chunk_tokens=5)
    for outputs in (ours, naive(model, 0.8)):
        grads = torch.autograd.grad((torch.stack(outputs) * upstream).sum(), trained)
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        base, _ = completion_logprobs(model, *batch())
        torch.testing.assert_close(base, naive(model)[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(base, completion_logprobs(model, *batch())[0])


def test_prompt_learning_is_refused(qwen: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="Prompt-learning"):
        completion_logprobs(peft.get_peft_model(qwen, config), *batch())


def test_unknown_logit_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("cohere")
    monkeypatch.setattr(scoring, "_logit_scale", lambda config: 1.0)
    with pytest.raises(ValueError, match="log-probabilities would be wrong"):
        completion_logprobs(model, *batch())


def test_verification_leaves_training_modes_alone(qwen: Any) -> None:
    qwen.train()
    qwen.model.layers[0].eval()
    before = [m.training for m in qwen.modules()]
    verify_head(qwen)
    assert [m.training for m in qwen.modules()] == before


def test_model_inputs_reach_the_backbone_for_the_fed_rows(qwen: Any) -> None:
    prompts, ids, mask, lengths = batch()
    seen: list[dict[str, Any]] = []
    qwen.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    extra, _ = completion_logprobs(
        qwen, prompts, ids, mask, lengths, model_inputs={"image": torch.arange(4), "mode": "x"}
    )
    torch.testing.assert_close(extra, naive(qwen)[0], rtol=1e-5, atol=1e-5)
    call = next(kwargs for kwargs in seen if "image" in kwargs)
    assert call["image"].tolist() == [0, 2, 3]
    assert call["attention_mask"].sum(1).tolist() == [9, 10, 8]


def test_backbone_without_head_is_refused(qwen: Any) -> None:
    with pytest.raises(ValueError, match="ForCausalLM"):
        find_head(qwen.model)


def test_refuses_empty_prompt_and_wrong_count(qwen: Any) -> None:
    prompts, ids, mask, lengths = batch()
    with pytest.raises(ValueError, match="at least one token"):
        completion_logprobs(qwen, [prompts[0][:0], *prompts[1:]], ids, mask, lengths)
    with pytest.raises(ValueError, match="prompt_index"):
        completion_logprobs(qwen, prompts[:2], ids, mask, lengths)
    with pytest.raises(ValueError, match="completion_mask"):
        completion_logprobs(qwen, prompts, ids, mask[:, :5], lengths, wanted=mask)
