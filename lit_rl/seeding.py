# SPDX-License-Identifier: Apache-2.0
"""What a step begins with. One seed, split by counters: no generator state is ever stored.

At the start of each rollout step every generator is seeded from (seed, rollout step, rank), so validation cannot
disturb training and resuming or rewinding needs no generator state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_precision() -> Iterator[None]:
    """Inside, new floating point tensors are float32, even if the model is not.

    Lightning makes the model's own type the default inside a step (``bf16-true``, ``64-true``), and rewards, counts and
    logged numbers would be rounded to it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def mix_seeds(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and their order.

    >>> mix_seeds(1, 2) != mix_seeds(2, 1)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything_from(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators from the parts."""
    import numpy as np

    seed = mix_seeds(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed spends a millisecond on devices that are not there
        torch.default_generator.manual_seed(seed)
