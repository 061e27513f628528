# SPDX-License-Identifier: Apache-2.0
"""When a completion ends: end-of-sequence tokens, stop tokens, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def end_token_ids(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Every end-of-sequence id that the model's generation config or the tokenizer names."""
    config = getattr(model, "generation_config", None)
    ids: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            ids.update(found if isinstance(found, (list, tuple)) else [found])
    return sorted(int(i) for i in ids)


def membership(ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Bool ``[V]`` lookup table, true at ``ids``; ids outside the vocabulary are left out."""
    table = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    table[[i for i in ids if 0 <= i < vocab_size]] = True
    return table


class StopStrings:
    """Finds the token that completes a stop string.

    Only rows whose newest token may hold a stop string's last character are decoded, and of those only a window that is
    sure to contain the string: every token writes at least one byte of it.

    Args:
        tokenizer: decodes ids to text.
        stop: the strings.
        vocab_size: V, the size of the model's head.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], vocab_size: int) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.window = max((len(s.encode()) for s in self.stop), default=0) + 4
        self.candidates = self._candidates(vocab_size)  # [V] bool: ids that may complete a stop string

    def _candidates(self, vocab_size: int) -> Tensor:
        ids = range(min(vocab_size, len(self.tokenizer)))
        text = self.tokenizer.batch_decode(
            [[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        last = {s[-1] for s in self.stop}
        # A token that is one part of a character decodes to U+FFFD, and some tokenizers drop a leading space.
        anything = any(c.isspace() for c in last)
        found = torch.zeros(vocab_size, dtype=torch.bool)
        for i, piece in zip(ids, text):
            found[i] = anything or "\ufffd" in piece or not last.isdisjoint(piece)
        return found

    def completed(self, ids: Sequence[int]) -> bool:
        """Whether the last of ``ids`` (the completion so far, or its last `window` tokens) completes a stop string."""
        tail = list(ids)[-self.window :]
        before = self._decode(tail[:-1]).rstrip("\ufffd")
        text = self._decode(tail)
        return any(text.find(s, max(0, len(before) - len(s) + 1)) >= 0 for s in self.stop)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
