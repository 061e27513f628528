# SPDX-License-Identifier: Apache-2.0
"""What is needed of any tokenizer, and one with a token for each character: for the quickstart, tests and claims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+-*/=,.:;?!#><() \nabcdefghijklmnopqrstuvwxyz'\"[]{}^_ABCDEFGHIJKLMNOPQRSTUVWXYZ$%&|~@`\\"


def build_character_tokenizer(vocabulary_size: int = 64) -> PreTrainedTokenizerFast:
    """A character tokenizer: padding, end of sequence, unknown, then characters; no begin of sequence.

    Save it with ``save_pretrained(folder)``; ``AutoTokenizer.from_pretrained(folder)`` reads it back. Encoding leaves
    out characters that the vocabulary does not have.

    Args:
        vocabulary_size: number of entries. 64 hold digits, signs and small letters, 99 all printable ASCII.

    Raises:
        ValueError: the vocabulary does not hold the digits and signs, or there are not so many characters.
    """
    least, most = len(SPECIAL) + CHARACTERS.index("a"), len(SPECIAL) + len(CHARACTERS)
    if not least <= vocabulary_size <= most:
        raise ValueError(f"vocabulary_size must be between {least} and {most}, got {vocabulary_size}.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without merges, not a word-level model: Transformers rebuilds the tokenizer of some model types
    # (Qwen2) as byte-level BPE from the vocabulary alone, and both must give the same tokens.
    stored = {" ": "Ġ", "\n": "Ċ"}
    entries = [*SPECIAL, *(stored.get(c, c) for c in CHARACTERS)][:vocabulary_size]
    backend = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def used_ids(tokenizer: Any) -> int:
    """One more than the tokenizer's largest id. It may leave ids below unused, and heads are often larger."""
    return max(tokenizer.get_vocab().values()) + 1
