# SPDX-License-Identifier: Apache-2.0
"""pass@k and maj@k of one prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k completions is correct.

    1 - C(n - c, k) / C(n, k), the estimator of the Codex paper (arXiv 2107.03374, equation 1).

    Args:
        samples: n completions that were drawn and could be scored.
        correct: c of them that are correct.
        k: how many one may look at; at most n.

    Raises:
        ValueError: if k is larger than the number of samples.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} scorable completions of each prompt, got {samples}.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[float]) -> float:
    """maj@n of one prompt: is the most frequent answer right? A tie counts in proportion.

    Right answers vote together however they are written; wrong ones vote for what they say.

    Args:
        answers: the answer of each completion, None where it gave none (those do not vote).
        correct: verdict of each completion, 1 or 0.

    Returns:
        Between 0 and 1; 0 if no completion gave an answer.

    >>> majority_correct(["7", "7.0", "3"], [1.0, 1.0, 0.0])
    1.0
    >>> majority_correct(["7", "3"], [1.0, 0.0])
    0.5
    """
    right = object()
    votes = Counter(right if c else a for a, c in zip(answers, correct) if a is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, n in votes.items() if n == most]
    return float(right in winners) / len(winners)
