# SPDX-License-Identifier: Apache-2.0
"""Contexts of very different lengths in one batch: computed and attended to without most of the padding."""

from typing import Any

import pytest
import torch
from sampler_models import connected, largest_gap, prompts, tiny_model

from lit_rl.samplers import RolloutRequest, Sampling, fast_decode
from lit_rl.samplers import decoder as decoder_module
from lit_rl.samplers.decoder import ModelDecoder
from lit_rl.samplers.fast_decode import FastDecoder

LENGTHS = (40, 3, 37, 5, 4, 90, 6)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_model("Qwen2")


def ragged_request(group_size: int = 3, max_tokens: int = 12) -> RolloutRequest:
    texts = [[(7 * i + 3 * n) % 40 + 2 for i in range(n)] for n in LENGTHS]
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=[9, 17])
    return RolloutRequest.for_groups(prompts(*texts), group_size, sampling, seed=5)


def sample(model: Any, request: RolloutRequest) -> Any:
    return connected(model).sample(request)


def test_contexts_of_similar_lengths_are_computed_together(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[list[int]] = []
    prefill = ModelDecoder._prefill

    def seen(decoder: Any, contexts: Any) -> Any:
        shapes.append([len(c) for c in contexts])
        return prefill(decoder, contexts)

    monkeypatch.setattr(ModelDecoder, "_prefill", seen)
    monkeypatch.setattr(decoder_module, "_WORTH_A_FORWARD", 1000)
    sampler = connected(qwen)
    shapes.clear()
    together = sampler.sample(ragged_request())
    assert shapes == [sorted(LENGTHS, reverse=True)]  # little text is computed at once, whatever the padding
    shapes.clear()
    monkeypatch.setattr(decoder_module, "_WORTH_A_FORWARD", 1)
    apart = sampler.sample(ragged_request())
    assert shapes == [[90], [40, 37], [6, 5], [4, 3]]
    assert torch.equal(apart.completion_ids, together.completion_ids)
    assert largest_gap(qwen, apart) < 2e-5


@pytest.mark.parametrize("name", ["Qwen2", "Llama", "Qwen3"])
def test_rows_that_leave_out_padding_draw_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    whole = sample(model, ragged_request())
    used: list[list[tuple[int, int, int]]] = []
    blocks_of = FastDecoder._blocks

    def seen(decoder: Any) -> Any:
        found = blocks_of(decoder)
        padding = (decoder.column - decoder.position).tolist()
        rows = [i for rows, _ in found for i in range(len(padding))[rows]]
        assert rows == list(range(len(padding)))  # every row once, in order
        assert all(cut == min(padding[rows]) for rows, cut in found)  # as much as no row of the block needs
        used.append([(rows.start or 0, rows.stop or len(padding), cut) for rows, cut in found])
        return found

    monkeypatch.setattr(FastDecoder, "_blocks", seen)
    monkeypatch.setattr(fast_decode, "_WORTH_A_BLOCK", 1)
    cut = sample(model, ragged_request())
    assert max(len(blocks) for blocks in used) >= 4
    assert len(used) > 3  # also after rows have left
    assert torch.equal(cut.completion_ids, whole.completion_ids)
    assert largest_gap(model, cut) < 2e-5


def test_a_batch_without_much_padding_attends_at_once(qwen: Any) -> None:
    decoder = FastDecoder(qwen)
    contexts = [torch.arange(2, 2 + n) for n in (4, 9, 6)]
    with decoder_module.decoding(qwen):
        decoder.start(contexts, torch.tensor([0, 1, 2]), 4)
    assert len(decoder.blocks) == 1
    with decoder_module.decoding(qwen):
        decoder.start([torch.arange(2000) % 40, torch.tensor([3, 4])], torch.tensor([0, *[1] * 40]), 4)
    assert decoder.blocks[0].padding == 0
    assert decoder.blocks[-1].padding == 1998
