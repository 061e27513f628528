# SPDX-License-Identifier: Apache-2.0
"""Whether token ids mean the same to two models."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_rl.policies.scoring import find_head


def common_vocabulary(first: nn.Module, second: nn.Module) -> int:
    """Rows that two heads have in common: families pad their heads to different multiples."""
    return min(find_head(first).vocab_size, find_head(second).vocab_size)


def check_same_vocabulary(student: nn.Module, tokenizer: Any, teacher: nn.Module, teacher_tokenizer: Any) -> int:
    """Token ids must mean the same to both models; only the padding rows of their heads may differ.

    Args:
        student: the policy.
        tokenizer: its tokenizer.
        teacher: the teacher's model.
        teacher_tokenizer: its tokenizer; None if it is a copy of the policy.

    Returns:
        The number of rows that both heads have.

    Raises:
        ValueError: an id stands for two different tokens, or one of the heads is shorter than the vocabulary.
    """
    mine = tokenizer.get_vocab()
    theirs = mine if teacher_tokenizer is None else teacher_tokenizer.get_vocab()
    if mine != theirs:
        differing = next(token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token))
        raise ValueError(
            f"The teacher's vocabulary is not the policy's: {differing!r} has the id {theirs.get(differing)} there and "
            f"{mine.get(differing)} here ({len(theirs)} and {len(mine)} tokens). Probabilities of tokens can only be "
            "compared between models of one tokenizer: choose a teacher of the same family."
        )
    common = common_vocabulary(student, teacher)
    if common <= max(mine.values()):
        raise ValueError(
            f"The tokenizer has ids up to {max(mine.values())}, but one of the two heads has only {common} rows: use "
            "models whose heads hold the whole vocabulary."
        )
    return common
