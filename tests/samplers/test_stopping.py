# SPDX-License-Identifier: Apache-2.0
"""Ends of completions: tables over the vocabulary, and stop strings against decoding everything at every step."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampler_models import byte_tokenizer, character_tokenizer

from lit_rl.samplers import Sampling
from lit_rl.samplers.stopping import Stopping, StopStrings, end_token_ids
from lit_rl.tokenizers import used_ids


def sentencepiece_tokenizer() -> Any:
    """Pieces with a leading space that decoding drops at the start of a text, as Llama's first tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<eos>", "▁", "▁the", "▁a", "the", "a", "t", "h", "e", "▁t", "he", ".", "\n"]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def naive_end(tokenizer: Any, ids: list[int], stop: list[str]) -> int | None:
    """Length at which the decoded text first holds a stop string."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        if any(s in text for s in stop):
            return n
    return None


def found_end(strings: StopStrings, suspect: list[bool], ids: list[int]) -> int | None:
    """The same by looking at suspects' windows only."""
    for n in range(1, len(ids) + 1):
        if suspect[ids[n - 1]] and strings.completed(ids[max(0, n - strings.window) : n]):
            return n
    return None


CASES = [
    (character_tokenizer, ["ab", "cc", "?"], "abc?= "),
    (byte_tokenizer, ["the", "</s", " the", "th", "é", "€.", "e</"], "the é€.</s>"),
    (byte_tokenizer, ["\n\n", "a\n"], "a\nb "),
    (sentencepiece_tokenizer, [" a", "the a", "e\n", "the ", "a "], "the a\n."),
]


@pytest.mark.parametrize(("make", "stop", "letters"), CASES)
def test_a_string_is_found_at_the_token_that_completes_it(make: Any, stop: list[str], letters: str) -> None:
    """Random token sequences: strings over several tokens, tokens over several strings, parts of characters."""
    tokenizer = make()
    rng = random.Random(0)
    ids = sorted({i for i in range(used_ids(tokenizer)) if set(tokenizer.decode([i])) & set(letters)})
    ids += tokenizer("é€", add_special_tokens=False)["input_ids"] if make is byte_tokenizer else []
    ends = []
    for string in stop:
        strings = StopStrings(tokenizer, [string])
        suspect = strings.suspects(used_ids(tokenizer)).tolist()
        for _ in range(60):
            sequence = [rng.choice(ids) for _ in range(25)]
            ends.append(naive_end(tokenizer, sequence, [string]))
            assert found_end(strings, suspect, sequence) == ends[-1], tokenizer.decode(sequence)
    strings = StopStrings(tokenizer, stop)
    suspect = strings.suspects(used_ids(tokenizer)).tolist()
    for _ in range(100):
        sequence = [rng.choice(ids) for _ in range(25)]
        assert found_end(strings, suspect, sequence) == naive_end(tokenizer, sequence, stop), tokenizer.decode(sequence)
    assert sum(end is not None for end in ends) > 10
    assert sum(end is None for end in ends) > 10


def test_a_character_of_several_tokens_is_found_at_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a€", add_special_tokens=False)["input_ids"]
    strings = StopStrings(tokenizer, ["€"])
    assert len(ids) == 4
    assert [strings.completed(ids[:n]) for n in range(1, 5)] == [False, False, False, True]


def test_few_tokens_are_suspects() -> None:
    """Else every completion would be decoded at every step."""
    tokenizer = byte_tokenizer()
    suspects = StopStrings(tokenizer, ["</s"]).suspects(264).nonzero()[:, 0].tolist()
    pieces = tokenizer.convert_ids_to_tokens(suspects)
    whole = [p for p, i in zip(pieces, suspects, strict=True) if "\ufffd" not in tokenizer.decode([i])]
    assert sorted(whole) == ["</s", "<bos>", "<eos>", "s"]  # all others are parts of a character


def test_a_string_that_was_complete_before_is_not_found_again() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(list("abb"))
    strings = StopStrings(tokenizer, ["ab"])
    assert [strings.completed(ids[:n]) for n in (1, 2, 3)] == [False, True, False]


def test_empty_strings_stop_nothing() -> None:
    tokenizer = character_tokenizer()
    assert Stopping(None, tokenizer, Sampling(stop=["", ""]), vocab_size=47, device="cpu").strings is None
    strings = Stopping(None, tokenizer, Sampling(stop=["", "ab"]), vocab_size=47, device="cpu").strings
    assert strings is not None
    assert strings.stop == ["ab"]


@pytest.mark.parametrize(
    ("model_ends", "tokenizer_end", "expected"),
    [(None, 1, [1]), (5, 1, [1, 5]), ([7, 5, 1], 1, [1, 5, 7]), (None, None, []), (0, None, [0])],
)
def test_every_end_that_model_or_tokenizer_name_counts(model_ends: Any, tokenizer_end: Any, expected: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=model_ends))
    assert end_token_ids(model, SimpleNamespace(eos_token_id=tokenizer_end)) == expected


def test_ends_and_stop_tokens_are_told_apart() -> None:
    tables = Stopping(None, character_tokenizer(), Sampling(stop_token_ids=[9, 1000]), vocab_size=60, device="cpu")
    assert tables.is_end.nonzero()[:, 0].tolist() == [1]
    assert tables.ends.nonzero()[:, 0].tolist() == [1, 9]
    assert tables.usable == 47  # the head has 60 rows


def test_ids_above_a_gap_in_the_vocabulary_are_usable() -> None:
    """Counting the entries instead would forbid the largest ids, often the end of a turn."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "<end>": 9}, eos_token_id=9)
    assert Stopping(None, tokenizer, Sampling(), vocab_size=16, device="cpu").usable == 10
    assert Stopping(None, tokenizer, Sampling(), vocab_size=8, device="cpu").usable == 8


def test_suspects_are_a_table_over_the_whole_head() -> None:
    tables = Stopping(None, character_tokenizer(), Sampling(stop=["b"]), vocab_size=60, device="cpu")
    assert tables.suspect is not None
    assert tables.suspect.shape == (60,)
    assert tables.suspect.dtype == torch.bool
    assert not bool(tables.suspect[47:].any())
