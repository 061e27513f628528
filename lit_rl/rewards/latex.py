# SPDX-License-Identifier: Apache-2.0
r"""LaTeX answers, compared by math-verify (the extra ``math``). Runs in a worker process, where a hang can be killed.

No torch here, so that the worker starts quickly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

from lit_rl.rewards.numeric import last_boxed, read_number

_ADVICE = 'MathReward(backend="math_verify") needs the package math-verify: pip install "lit-rl[math]".'


def match_latex(completion: str, answer: Any, *, same_text: bool = True) -> float | None:
    r"""Whether the final answer of ``completion`` is mathematically equal to ``answer``.

    Args:
        completion: generated text; its last ``\boxed{}`` counts, without one the last formula or number.
        answer: gold answer in LaTeX, or a solution whose last ``\boxed{}`` is the answer.
        same_text: accept a box whose text equals the gold answer but for spaces before any parsing: quick, and right
            for answers that are words.

    Returns:
        1.0 or 0.0; None if the gold answer cannot be read.

    Raises:
        ImportError: math-verify is not installed.
    """
    parse, verify, config = _math_verify()
    if answer is None or not str(answer).strip():
        return None
    gold_text = last_boxed(str(answer)) or str(answer).strip()
    box = last_boxed(completion)
    if same_text and box is not None and _bare(box) == _bare(gold_text):
        return 1.0
    # Time limits of math-verify use signal.alarm; the pool's own limit replaces them.
    gold = parse(rf"\boxed{{{gold_text}}}", extraction_config=config, parsing_timeout=None)
    if not gold:
        return None
    found = parse(completion if box is None else rf"\boxed{{{box}}}", extraction_config=config, parsing_timeout=None)
    return float(bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True))


def last_answer(completion: str) -> Hashable | None:
    r"""What stands in the last ``\boxed{}``, for majority votes: a number, or text without spaces.

    No parsing here: ways to write one expression count as different answers, unless they are numbers.

    >>> last_answer(r"\boxed{0.50}") == last_answer(r"so \boxed{\frac{1}{2}}")
    True
    """
    box = last_boxed(completion)
    if box is None:
        return None
    number = read_number(box)
    return _bare(box) if number is None else number


def check_math_verify() -> None:
    """Raise ``ImportError`` with advice if math-verify is not installed."""
    from importlib.util import find_spec

    if find_spec("math_verify") is None:
        raise ImportError(_ADVICE)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any, Any]:
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError(_ADVICE) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    return parse, verify, (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
