# SPDX-License-Identifier: Apache-2.0
"""When a completion ends: end-of-sequence tokens, stop tokens, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rl.samplers.base import Sampling
from lit_rl.tokenizers import used_ids


class Stopping:
    """The tokens and strings that end a completion, as lookup tables over the vocabulary.

    Args:
        model: its generation config may name end-of-sequence tokens.
        tokenizer: names one too, and decodes where there are stop strings.
        sampling: stop strings and stop token ids.
        vocab_size: V, the size of the model's head.
        device: where the tables lie.

    Attributes:
        usable: ids below this may be drawn; beyond it are padding rows of the head that no token of the tokenizer uses.
        is_end: ``[V]`` bool, end-of-sequence tokens.
        ends: ``[V]`` bool, these and the stop tokens.
        suspect: ``[V]`` bool, tokens that may complete a stop string; None without stop strings.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, *, vocab_size: int, device: torch.device | str
    ) -> None:
        self.usable = min(vocab_size, used_ids(tokenizer))
        end = end_token_ids(model, tokenizer)
        self.is_end = _table(end, vocab_size).to(device)
        self.ends = _table([*end, *sampling.stop_token_ids], vocab_size).to(device)
        self.strings = StopStrings(tokenizer, sampling.stop) if any(sampling.stop) else None
        self.suspect = self.strings.suspects(vocab_size).to(device) if self.strings else None


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every end-of-sequence id that the model's generation config or the tokenizer names."""
    config = getattr(model, "generation_config", None)
    ids: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            ids.update(found if isinstance(found, (list, tuple)) else [found])
    return sorted(int(i) for i in ids)


class StopStrings:
    """Finds the token that completes a stop string.

    Only completions whose newest token may hold a stop string's last character are decoded, and of those only a tail
    that is sure to contain the string: every token writes at least one byte of it.

    Args:
        tokenizer: decodes ids to text.
        stop: the strings; empty ones are left out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.window = max(len(s.encode()) for s in self.stop) + 4

    def suspects(self, vocab_size: int) -> Tensor:
        """``[V]`` bool: tokens that may complete a stop string. May name too many, never too few."""
        ids = range(min(vocab_size, used_ids(self.tokenizer)))
        pieces = self.tokenizer.batch_decode(
            [[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        last = {s[-1] for s in self.stop}
        # A token that is a part of a character decodes to U+FFFD, and some tokenizers drop a leading space.
        all_of_them = any(c.isspace() for c in last)
        found = [i for i, p in zip(ids, pieces) if all_of_them or "\ufffd" in p or not last.isdisjoint(p)]
        return _table(found, vocab_size)

    def completed(self, ids: Sequence[int]) -> bool:
        """Whether the last of ``ids`` (a completion, or its last `window` tokens) completes a stop string."""
        tail = list(ids)[-self.window :]
        before = self._decode(tail[:-1]).rstrip("\ufffd")
        text = self._decode(tail)
        return any(text.find(s, max(0, len(before) - len(s) + 1)) >= 0 for s in self.stop)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _table(ids: Sequence[int], vocab_size: int) -> Tensor:
    """Bool ``[V]``, true at ``ids``; those outside the vocabulary are left out."""
    table = torch.zeros(vocab_size, dtype=torch.bool)
    table[[i for i in ids if 0 <= i < vocab_size]] = True
    return table
