# SPDX-License-Identifier: Apache-2.0
"""`HFSampler` inside a trainer's process: rows and waves, modes, precision, adapters, vocabularies, faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampler_models import (
    THREE,
    byte_tokenizer,
    character_tokenizer,
    connected,
    full_logits,
    largest_gap,
    prompts,
    request,
    tiny_model,
)
from torch import Tensor

from lit_rl.policies import completion_logprobs
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import HFSampler, RolloutRequest, Sampling
from lit_rl.samplers import decode_loop as decode_loop_module
from lit_rl.samplers.decoder import ModelDecoder
from lit_rl.samplers.noise import row_keys


@pytest.fixture
def qwen() -> Any:
    return tiny_model("Qwen2")


class Calls:
    """Rows of each forward: prefills as (rows, columns), decode steps as rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefills: list[tuple[int, int]] = []
        self.steps: list[int] = []
        prefill, step = ModelDecoder._prefill, ModelDecoder.step

        def counted_prefill(decoder: Any, contexts: Any) -> Any:
            self.prefills.append((len(contexts), max(len(c) for c in contexts)))
            return prefill(decoder, contexts)

        def counted_step(decoder: Any, tokens: Tensor) -> Tensor:
            self.steps.append(len(tokens))
            return step(decoder, tokens)

        monkeypatch.setattr(ModelDecoder, "_prefill", counted_prefill)
        monkeypatch.setattr(ModelDecoder, "step", counted_step)


def trainers_logprobs(model: Any, out: Rollouts, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        ids = [out.prompts.ids[g] for g in out.group.tolist()]
        rest = out.completion_ids, out.completion_mask, out.lengths
        return completion_logprobs(model, ids, *rest, temperature=temperature)[0]


# The work that is done ----------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_for_its_group(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, calls = connected(qwen), Calls(monkeypatch)
    sampler.sample(request(16))
    assert calls.prefills == [(3, 8)]


def test_prefills_stay_within_their_budget_of_padded_tokens(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, calls = connected(qwen, prefill_tokens=14), Calls(monkeypatch)
    out = sampler.sample(request(4))
    assert calls.prefills == [(1, 8), (2, 5)]
    assert largest_gap(qwen, out) < 2e-5


def test_rows_that_have_ended_leave_the_batch(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is computed for its own tokens, and little beyond: dropping waits until a sixteenth has ended."""
    sampler, calls = connected(qwen), Calls(monkeypatch)
    out = sampler.sample(request(22, max_tokens=40, stop_token_ids=[9, 17, 30]))
    assert calls.steps == sorted(calls.steps, reverse=True)
    ended_early = int((out.lengths < int(out.lengths.max())).sum())
    assert ended_early > 50
    useful = int(out.lengths.sum()) - len(out)  # the first token of each comes from the prefill
    assert useful <= sum(calls.steps) <= useful + len(out) / 16 * int(out.lengths.max())
    assert len(calls.steps) == int(out.lengths.max()) - 1
    for values in out.token.values():  # of what a row drew between its end and its leaving nothing is left
        assert not bool((values != 0)[~out.completion_mask].any())


def test_no_forward_runs_after_the_last_token(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, calls = connected(qwen), Calls(monkeypatch)
    sampler.sample(request(max_tokens=1))
    assert (calls.prefills, calls.steps) == ([(3, 8)], [])


def test_more_rows_than_fit_are_decoded_in_waves(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = connected(qwen).sample(request(5))
    sampler, calls = connected(qwen, max_rows=4), Calls(monkeypatch)
    out = sampler.sample(request(5))
    assert max(calls.steps) <= 4
    assert len(calls.prefills) == 4
    assert out.completions() == whole.completions()
    torch.testing.assert_close(out.logprobs["sampler"], whole.logprobs["sampler"], rtol=1e-5, atol=2e-5)


def test_an_interruption_leaves_later_waves_unstarted(qwen: Any) -> None:
    sampler = connected(qwen, max_rows=4)
    out = sampler.sample(request(4, should_stop=lambda p: p.step >= 2))
    assert out.lengths.tolist() == [2] * 4 + [0] * 8
    assert (out.row["stop_reason"] == StopReason.ABORTED).all()
    assert sampler.sample(request(4, prefix=out)).completions() == connected(qwen).sample(request(4)).completions()


def test_progress_counts_steps_over_all_waves(qwen: Any) -> None:
    seen: list[int] = []
    connected(qwen, max_rows=6).sample(request(4, max_tokens=5, should_stop=lambda p: bool(seen.append(p.step))))
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) == 10


def test_completions_longer_than_the_first_cache_and_noise_block(qwen: Any) -> None:
    """Positions beyond the 128 columns allocated at first, and the 64 positions of noise hashed at once."""
    qwen.generation_config.eos_token_id = None
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    out = connected(qwen, tokenizer).sample(request(1, max_tokens=180))
    assert out.lengths.tolist() == [180] * 3
    assert largest_gap(qwen, out) < 5e-5


def test_each_position_has_its_own_noise(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after rows have moved, after a block of positions, and in a continued completion."""
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    original = decode_loop_module.DecodeLoop._draw

    def recorded(loop: Any, logits: Tensor, batch: Any, noise: Tensor) -> Tensor:
        drawn.append((batch.index.clone(), batch.column.clone(), noise.clone()))
        return original(loop, logits, batch, noise)

    monkeypatch.setattr(decode_loop_module.DecodeLoop, "_draw", recorded)
    monkeypatch.setattr(decode_loop_module, "_BLOCK", 4)
    sampler = connected(qwen)
    work = request(8, max_tokens=11, stop_token_ids=[9, 17, 30])
    part = sampler.sample(request(8, max_tokens=11, stop_token_ids=[9, 17, 30], should_stop=lambda p: p.step >= 3))
    sampler.sample(request(8, max_tokens=11, stop_token_ids=[9, 17, 30], prefix=part))
    keys = row_keys(work.seed, work.prompts.draw[work.group], work.sample)
    assert len({len(index) for index, _, _ in drawn}) > 1
    for index, column, noise in drawn:
        assert torch.equal(noise, decode_loop_module.uniforms(keys[index], column))


# The distribution ----------------------------------------------------------------------------------------------------


def test_pairs_of_tokens_follow_the_joint_distribution() -> None:
    """All 36 pairs of a vocabulary of six, 6000 completions: noise of neighbouring positions is independent."""
    model = tiny_model("Qwen2", vocab_size=6)
    sampler = connected(model, max_rows=1500)
    out = sampler.sample(request(6000, texts=[[3, 4, 5]], max_tokens=2, entropy=False))
    first = full_logits(model, out.select(torch.tensor([0])))[0][0].softmax(-1).double()
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for token in range(6):
        with torch.no_grad():
            then = model(input_ids=torch.tensor([[3, 4, 5, token]])).logits[0, -1].softmax(-1)
        expected[token] = first[token] * then
    expected[1] = 0
    expected[1, 0] = first[1]  # the end: nothing follows, the place is padded with 0
    counts = (out.completion_ids[:, 0] * 6 + out.completion_ids[:, 1]).bincount(minlength=36).double()
    expected = expected.flatten() * 6000
    often = expected >= 5
    assert int(counts[expected == 0].sum()) == 0
    statistic = ((counts - expected)[often].square() / expected[often]).sum()
    assert torch.special.gammaincc((often.sum().double() - 1) / 2, statistic / 2) > 1e-4
    assert abs(float(counts[~often].sum() - expected[~often].sum())) < 25


def test_padding_rows_of_the_head_are_never_drawn_but_count_as_in_the_trainer() -> None:
    model: Any = tiny_model("Qwen2", vocab_size=64, tie_word_embeddings=False)  # the tokenizer has 47
    with torch.no_grad():
        model.lm_head.weight[47:] = 3 * model.lm_head.weight[5]  # and they are no less likely than others
    sampler = connected(model)
    for settings in ({}, {"noise": "gumbel"}, {"top_p": 0.9}, {"temperature": 0.0}):
        assert int(sampler.sample(request(20, **settings)).completion_ids.max()) < 47
    out = sampler.sample(request())
    assert largest_gap(model, out) < 2e-5
    torch.testing.assert_close(trainers_logprobs(model, out), out.logprobs["sampler"], rtol=1e-5, atol=2e-5)
    restricted = sampler.sample(request(40, top_p=0.9))
    mass = torch.stack([x[0] for x in full_logits(model, restricted)]).softmax(-1)[:, 47:].sum(-1)
    assert float(mass.max()) > 0.05  # else this shows nothing
    token, logprob = restricted.completion_ids[:40, 0], restricted.logprobs["sampler"][:40, 0]
    seen = dict(zip(token.tolist(), logprob.exp().tolist(), strict=True))
    assert 0.85 < sum(seen.values()) < 1.001  # of one prompt: the support's tokens share all the probability


def test_a_head_larger_than_its_configuration_says(qwen: Any) -> None:
    qwen.resize_token_embeddings(80)
    qwen.config.vocab_size = 48
    out = connected(qwen).sample(request())
    assert largest_gap(qwen, out) < 2e-5


def test_a_config_with_several_ends_ends_at_each(qwen: Any) -> None:
    qwen.generation_config.eos_token_id = [1, 9, 17]
    out = connected(qwen).sample(request(20, max_tokens=30))
    last = torch.tensor([ids[-1] for ids in out.completions()])
    ended = out.row["stop_reason"] == StopReason.END
    assert torch.equal(ended, torch.isin(last, torch.tensor([1, 9, 17])))
    assert set(last[ended].tolist()) == {1, 9, 17}


@pytest.mark.parametrize("stop", [["</s"], ["the"], ["é"], ["s>", "th"]])
def test_stop_strings_of_a_byte_level_tokenizer(stop: list[str]) -> None:
    """Each row is the unstopped one, cut where its text first holds a stop string."""
    tokenizer = byte_tokenizer()
    model: Any = tiny_model("Qwen2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    likely = tokenizer("the</s>é", add_special_tokens=False)["input_ids"] + tokenizer.convert_tokens_to_ids(
        ["t", "h", "e", "th", "<", "/", "s", ">"]
    )
    head = torch.nn.Linear(32, len(tokenizer))  # such that these tokens are written often
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(-6.0)
        head.bias[likely] = 2.0
    model.lm_head = head
    sampler = connected(model, tokenizer)
    free = sampler.sample(request(30, max_tokens=25))
    out = sampler.sample(request(30, max_tokens=25, stop=stop))
    for ids, cut, reason in zip(free.completions(), out.completions(), out.row["stop_reason"].tolist(), strict=True):
        texts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
        ends = [n for n, text in enumerate(texts, 1) if any(s in text for s in stop)]
        assert cut == ids[: ends[0] if ends else None]
        assert (reason == StopReason.STOP) == bool(ends)
    assert int((out.row["stop_reason"] == StopReason.STOP).sum()) > 5


# Inside a trainer ----------------------------------------------------------------------------------------------------


def test_checkpointing_is_off_and_the_cache_on_while_sampling(qwen: Any) -> None:
    """With them the other way round, each step would run over the whole sequence."""
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    qwen.config.use_cache = False
    qwen.train()
    sampler = connected(qwen)
    calls: list[tuple[tuple[int, ...], bool, bool]] = []
    # a hooked model is decoded by its own forward, which is what has to be watched here
    handle = qwen.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (tuple(kwargs["input_ids"].shape), kwargs["use_cache"], module.training or torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    out = sampler.sample(request(2, max_tokens=5))
    handle.remove()
    assert calls == [((3, 8), True, False)] + [((6, 1), True, False)] * (len(calls) - 1)
    assert len(calls) == int(out.lengths.max())
    assert all(m.training for m in qwen.modules())
    assert qwen.is_gradient_checkpointing
    qwen(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()  # it still trains
    assert largest_gap(qwen.eval(), out) < 2e-5


def test_dropout_is_off_while_sampling() -> None:
    model = tiny_model("GPT2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    sampler = connected(model)
    out = sampler.sample(request())
    assert model.training
    assert largest_gap(model.eval(), out) < 2e-5


def test_modules_keep_their_own_modes(qwen: Any) -> None:
    qwen.train()
    qwen.model.layers[0].eval()
    before = [m.training for m in qwen.modules()]
    connected(qwen).sample(request())
    assert [m.training for m in qwen.modules()] == before


def test_modes_are_restored_after_an_error(qwen: Any) -> None:
    qwen.train()
    sampler = connected(qwen)

    def fail(progress: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(request(should_stop=fail))
    assert all(m.training for m in qwen.modules())
    assert torch.is_grad_enabled()


def test_attention_without_masks_is_switched_while_sampling(qwen: Any) -> None:
    sampler = connected(qwen)
    qwen.set_attn_implementation("flex_attention")
    seen: set[str] = set()
    sampler.sample(request(should_stop=lambda p: bool(seen.add(qwen.config._attn_implementation))))
    assert seen == {"sdpa"}
    assert qwen.config._attn_implementation == "flex_attention"


def test_each_request_sees_the_weights_of_its_time(qwen: Any) -> None:
    """The fast decoder fuses weights into copies, which must not outlive a request."""
    sampler = connected(qwen)
    before = sampler.sample(request())
    for _ in range(2):
        with torch.no_grad():
            for p in qwen.parameters():
                p.mul_(1.1)
        out = sampler.sample(request())
        assert out.completions() != before.completions()
        assert largest_gap(qwen, out) < 2e-5


def test_nothing_of_a_request_is_kept(qwen: Any) -> None:
    sampler = connected(qwen)
    sampler.sample(request())
    assert sampler.decoder is not None
    assert not {"cache", "layers", "mask"} & vars(sampler.decoder).keys()


@pytest.mark.parametrize("name", ["Qwen2", "GPT2", "Gemma2"])
def test_half_precision_weights(name: str) -> None:
    model = tiny_model(name).bfloat16()
    out = connected(model).sample(request(8))
    assert out.logprobs["sampler"].dtype == torch.float32
    gap = (trainers_logprobs(model, out) - out.logprobs["sampler"])[out.completion_mask].abs()
    assert float(gap.mean()) < 0.03
    again = connected(model).sample(request(8))
    assert again.completions() == out.completions()


@pytest.mark.parametrize("name", ["Qwen2", "GPT2"])
def test_autocast(name: str) -> None:
    """Log-probabilities agree with the trainer's under the same autocast, and follow the weights inside one context."""
    model = tiny_model(name)
    sampler = connected(model)
    exact = sampler.sample(request(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            out = sampler.sample(request(8))
            gap = (trainers_logprobs(model, out) - out.logprobs["sampler"])[out.completion_mask].abs()
            assert float(gap.mean()) < 0.05
            assert float((trainers_logprobs(model, exact) - exact.logprobs["sampler"]).abs().max()) > 1e-3
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.2)


def test_rows_are_rounded_up_where_products_are_compiled_for_their_shape(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, calls = connected(qwen.bfloat16()), Calls(monkeypatch)
    out = sampler.sample(request(22, max_tokens=40, stop_token_ids=[9, 17, 30]))
    assert calls.steps[0] == 66
    assert all(n % 8 == 0 for n in calls.steps if n < 66)
    assert int(out.lengths.max()) > 10


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"], ["lm_head", "v_proj"]])
def test_adapters_are_part_of_the_policy(modules: Any) -> None:
    peft = pytest.importorskip("peft")
    base: Any = tiny_model("Qwen2", tie_word_embeddings=False)
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    sampler = connected(model)
    assert type(sampler.decoder).__name__ == "FastDecoder"
    out = sampler.sample(request())
    model.eval()
    assert largest_gap(model, out) < 2e-5
    torch.testing.assert_close(trainers_logprobs(model, out), out.logprobs["sampler"], rtol=1e-5, atol=2e-5)
    with model.disable_adapter():
        plain = sampler.sample(request())
        assert largest_gap(model, plain) < 2e-5
    assert plain.completions() != out.completions()
    assert sampler.sample(request()).completions() == out.completions()


def test_a_hooked_module_is_called_and_a_hooked_layer_ends_the_fast_way(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who watches or edits activations by hooks must see every token."""
    sampler = connected(qwen)
    plain = sampler.sample(request())
    steps = int(plain.lengths.max())
    calls: list[int] = []
    for module in (qwen.model.layers[0].mlp.up_proj, qwen.model.layers[1].input_layernorm, qwen.model.layers[1].mlp):
        calls.clear()
        handle = module.register_forward_hook(lambda m, args, out: calls.append(1))
        out = sampler.sample(request())
        handle.remove()
        assert len(calls) == steps
        assert out.completions() == plain.completions()
    handle = qwen.model.layers[0].register_forward_hook(lambda m, args, out: out * 0.5)
    out = sampler.sample(request())
    assert largest_gap(qwen, out) < 2e-5
    handle.remove()
    assert out.completions() != plain.completions()


# Requests ------------------------------------------------------------------------------------------------------------


def test_requests_are_answered_in_their_order(qwen: Any) -> None:
    sampler = connected(qwen)
    first, second = (sampler.sample(request(seed=seed)) for seed in (1, 2))
    for seed in (1, 2):
        sampler.submit(request(seed=seed))
    assert [sampler.collect().completions() for _ in range(2)] == [first.completions(), second.completions()]


def test_a_rewind_forgets_requests(qwen: Any) -> None:
    sampler = connected(qwen)
    sampler.submit(request())
    sampler.on_rewind(qwen)
    with pytest.raises(RuntimeError, match="nothing to collect"):
        sampler.collect()


def test_a_sampler_without_a_model_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\(model, tokenizer\)"):
        HFSampler().submit(request())


def test_an_empty_prompt_is_refused_by_name(qwen: Any) -> None:
    with pytest.raises(ValueError, match="prompt with uid 1 has no tokens"):
        connected(qwen).sample(request(texts=[[3], [], [4]]))
    unused = prompts([3], [])
    group = torch.zeros(2, dtype=torch.long)
    work = RolloutRequest(unused, group, torch.arange(2), Sampling(max_tokens=2), seed=0)
    assert len(connected(qwen).sample(work)) == 2  # nobody asks for it


def test_learned_positions_must_suffice() -> None:
    sampler = connected(tiny_model("GPT2", n_positions=20))
    assert int(sampler.sample(request(max_tokens=12)).lengths.max()) <= 12
    with pytest.raises(ValueError, match="8 tokens and a budget of 13 need 21 positions, but the model has only 20"):
        sampler.sample(request(max_tokens=13))
    rotary = connected(tiny_model("Llama", max_position_embeddings=10))
    assert len(rotary.sample(request(max_tokens=13)))


@pytest.mark.parametrize("settings", [{"max_rows": 0}, {"prefill_tokens": 0}, {"fallback": "no"}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        HFSampler(**settings)


def test_the_description_says_how_it_decodes(qwen: Any) -> None:
    assert HFSampler().describe() == "HFSampler(max_rows=256)"
    assert connected(qwen, max_rows=9).describe() == "HFSampler(max_rows=9, FastDecoder)"


def test_entropies_are_left_out_if_nobody_wants_them(qwen: Any) -> None:
    assert "entropy" not in connected(qwen).sample(request(entropy=False)).token


def test_contexts_are_those_of_the_prompts(qwen: Any) -> None:
    """The prompts come back as they were, each with its own completions."""
    out = connected(qwen).sample(request())
    assert [ids.tolist() for ids in out.prompts.ids] == [list(x) for x in THREE]
    assert out.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
