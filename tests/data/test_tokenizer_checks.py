# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that does not suit its model is found when the policy is loaded, not in the middle of a run."""

import json
from pathlib import Path

import pytest

from lit_rl.policies import Policy
from lit_rl.testing import make_policy
from lit_rl.tokenizers import CHARACTERS, SPECIAL, build_character_tokenizer


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    file.write_text(json.dumps(content))


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy", "llama")
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="no end-of-sequence token, so no completion could end by itself"):
        Policy(str(folder)).load()


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy", "llama")
    edit(folder / "tokenizer_config.json", pad_token=None)
    _, tokenizer = Policy(str(folder)).load()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy", "llama")
    build_character_tokenizer(99).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="ids up to 98, but the model only has 64 embeddings"):
        Policy(str(folder), tokenizer=str(tmp_path / "larger")).load()
    build_character_tokenizer(50).save_pretrained(tmp_path / "smaller")
    Policy(str(folder), tokenizer=str(tmp_path / "smaller")).load()  # a padded vocabulary is usual


def test_the_character_tokenizer_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_character_tokenizer(len(SPECIAL) + len(CHARACTERS))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (CHARACTERS, "57+68=\n", " a  b "):
        ids = again(text)["input_ids"]
        assert len(ids) == len(text)
        assert ids == tokenizer(text)["input_ids"]
        assert again.decode(ids) == text
    for size in (3, 1000):
        with pytest.raises(ValueError, match="vocabulary_size must be between"):
            build_character_tokenizer(size)
