# SPDX-License-Identifier: Apache-2.0
r"""Numbers in text as exact rationals: finding the final answer of a completion and comparing it with the gold one.

Pure standard library (no torch), so that it is cheap to import in a worker process.
Read: signs, thousands separators, decimals, ``a/b`` and ``\frac{a}{b}``, mixed numbers, powers of ten, number words
such as ``million``, currency signs, percent signs and units. The last three are ignored: ``50%``, ``$50`` and ``50 cm``
are all 50.
Repetitions in the patterns are bounded, so that no completion can make the search slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

Extraction = Literal["boxed", "hashes", "phrase", "last_number"]
EXTRACTIONS: tuple[Extraction, ...] = ("boxed", "hashes", "phrase", "last_number")

_LONGEST_ANSWER = 200  # characters of a text that is read as a single number
_LARGEST_POWER = 300  # of ten; beyond it exact arithmetic would only burn time

_DECIMAL = r"(?:\d{1,3}(?:,\d{3}){1,30}(?!\d|,\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?<![\w.])
    (?P<sign>(?<![)\]])[-+])?
    (?: (?P<whole>\d+)\s{{1,3}}(?P<part>\d+)\s?/\s?(?P<of>\d+)(?!\d|[.,]\d|\s?/\s?\d)             # 1 3/4
      | (?P<number>{_DECIMAL})
        (?: \s?/\s?(?P<divisor>-?{_DECIMAL})(?!\d|[.,]\d|\s?/\s?\d)                               # 3/4
          | (?: [eE] | \s?[*x×·]\s?10\s?\^\s?\{{?\s? )(?P<power>[-+]?\d{{1,4}})(?!\w)\s?\}}?       # 3e4, 3*10^4
        )?
    )""",
    re.VERBOSE,
)
# A percent sign or a unit. Digits only as exponents (cm^2). A lone letter without a space must be a unit: 3x is not 3.
_UNIT = re.compile(
    r"(?!\s*(?:pi|sqrt)\b)(?!(?![mgslhLdKCFVWJNA])[A-Za-z](?![A-Za-z]))"
    r"\s*(?:[-/]?\s?[A-Za-z%°²³'’(][A-Za-z%°²³\s\-/.,'’()]*(?:\^\s?\{?\s?[23]\s?\}?[A-Za-z\s\-/.,'’()]*)*)?[\s.,;:!?]*"
)
_SCALE = re.compile(r"\s?(hundred|thousand|million|billion)\b", re.IGNORECASE)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}

_LATEX_ARGUMENT = r"(?:\{\s*(-?[\d.,]+)\s*\}|(\d))"
_FRACTION = re.compile(rf"(?:(\d)\s?)?\\[dtc]?frac\s?{_LATEX_ARGUMENT}\s?{_LATEX_ARGUMENT}")
_WRAPPER = re.compile(r"\\(?:boxed|fbox|framebox|text|textbf|textit|mathrm|mathbf|mathit|mbox)\s?\{([^{}]*)\}")
_PLAIN = [  # LaTeX, markdown and currency signs to plain text, in this order
    (re.compile(r"<<[^<>\n]{0,200}>>"), ""),  # GSM8K's calculator notes: 15*8 = <<15*8=120>>120
    (re.compile(r",\\!\s?|\{,\}"), ","),
    (re.compile(r"\\!|(?<=\d)\\,(?=\d{3})|\*\*|__|`|\\(?:left|right|displaystyle)\b|\\[()\[\]]"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad\b|~"), " "),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ\b)|\\degree\b"), " degrees"),
    (re.compile(r"\\times\b|\\cdot\b"), "*"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<=[-+])\s?\\?[$€£¥₹]\s?"), ""),
    (re.compile(r"\\?[$€£¥₹]"), " "),
]
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s?\{)|\\[{}]|[{}]")
# Not "points/answer = 48", where the word belongs to a unit.
_PHRASE = re.compile(r"(?<!/)\banswer(?:\s?[:=]|\b[^\n.:=]{0,40}?\b(?:is|are)\b)[:\s]{0,5}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_OPERATOR = re.compile(r"\s?[-+*/^×·\\]")


def match_numeric(
    completion: str, answer: Any, *, extraction: Sequence[Extraction] = EXTRACTIONS, tolerance: float = 0.0
) -> float | None:
    """Whether the final number of ``completion`` is the one in ``answer``.

    Args:
        completion: generated text.
        answer: gold answer: a number, its text, or a solution that ends in ``#### number`` or a box.
        extraction: where the completion may state its answer, see `find_answer`.
        tolerance: largest difference relative to the gold answer; 0 compares exactly.

    Returns:
        1.0 or 0.0; None if the gold answer cannot be read.
    """
    gold = read_gold(answer)
    if gold is None:
        return None
    found = find_answer(completion, extraction)
    return float(found is not None and abs(found - gold) <= Fraction(tolerance) * abs(gold))


def find_answer(completion: str, extraction: Sequence[Extraction] = EXTRACTIONS) -> Fraction | None:
    r"""The final answer that a completion states, looked for in the given places in the given order.

    ``boxed``: the last ``\boxed{}``; if it holds anything but a number, there is no answer. ``hashes``: after the last
    ``####`` that a number follows (others are headings). ``phrase``: after "answer is" or "answer:".
    ``last_number``: the last number of the text, wherever it stands.
    """
    plain = None  # made once, and only if needed
    for place in extraction:
        if place == "boxed":
            box = last_boxed(completion)
            if box is not None:
                return read_number(box)
        elif place == "hashes":
            found = _last_readable(line.partition("\n")[0] for line in completion.split("####")[1:])
            if found is not None:
                return found
        elif place == "phrase":
            plain = to_plain(completion) if plain is None else plain
            found = _last_readable(plain[match.end() : match.end() + 300] for match in _PHRASE.finditer(plain))
            if found is not None:
                return found
        elif place == "last_number":
            last = None
            for last in _NUMBER.finditer(to_plain(completion) if plain is None else plain):  # noqa: B007
                pass
            return None if last is None else _value(last)
        else:
            raise ValueError(f"extraction knows {EXTRACTIONS}, not {place!r}.")
    return None


def read_gold(answer: Any) -> Fraction | None:
    """The number that a dataset's answer column means, None if it means none."""
    if isinstance(answer, bool) or answer is None:
        return None
    text = str(answer).rpartition("####")[2]
    box = last_boxed(text)
    return read_number(text if box is None else box)


def read_number(text: str) -> Fraction | None:
    r"""The number that the whole of ``text`` is, or that stands behind its last equals sign.

    >>> read_number(r"$x = 1\frac{3}{4}$ cups")
    Fraction(7, 4)
    >>> read_number("3 or 4") is None
    True
    """
    if len(text) > _LONGEST_ANSWER:
        return None
    plain = to_plain(text).rpartition("=")[2].strip()
    while plain[:1] + plain[-1:] in ("()", "{}"):
        plain = plain[1:-1].strip()
    plain = re.sub(r"^([-+])\s+", r"\1", plain)
    match = _NUMBER.match(plain)
    if match is None:
        return None
    value, end = _scaled(match, plain)
    return value if _UNIT.fullmatch(plain, end) else None


def to_plain(text: str) -> str:
    """LaTeX, markdown and currency signs written as plain text; what is not understood stays as it is."""
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = _FRACTION.sub(_plain_fraction, text)
    return _WRAPPER.sub(r" \1 ", text)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete, non-empty ``\boxed{…}`` of ``text``."""
    inside = None
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and text[start : match.start()].strip():
                inside = text[start : match.start()].strip()
        elif match[0] == "{":
            open_braces.append(None)
        elif match["box"]:
            open_braces.append(match.end())
    return inside


def _last_readable(texts: Iterator[str]) -> Fraction | None:
    """The number with which the last of ``texts`` starts that starts with one; a sum is read behind its equals sign."""
    for text in reversed(list(texts)):
        plain = to_plain(text).lstrip()
        sentence = plain[: end.start()] if (end := _SENTENCE_END.search(plain)) else plain
        value = read_number(sentence)
        match = _NUMBER.match(plain)
        if value is None and match is not None:
            scaled, stop = _scaled(match, plain)
            value = None if _OPERATOR.match(plain, stop) else scaled
        if value is not None:
            return value
    return None


def _scaled(match: re.Match[str], text: str) -> tuple[Fraction | None, int]:
    """The value of a number with the word behind it (``2 million``), and where it ends."""
    value, scale = _value(match), _SCALE.match(text, match.end())
    if value is None or scale is None:
        return value, match.end()
    return value * _SCALES[scale[1].lower()], scale.end()


def _value(match: re.Match[str]) -> Fraction | None:
    """The rational that a match of `_NUMBER` means; None for a division by zero or an absurd size."""
    if max(len(part) for part in match.groups(default="")) > _LONGEST_ANSWER:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["whole"]:
        whole, part, of = (int(match[name]) for name in ("whole", "part", "of"))
        return sign * (whole + Fraction(part, of)) if of else None
    value = Fraction(match["number"].replace(",", ""))
    if match["divisor"]:
        divisor = Fraction(match["divisor"].replace(",", ""))
        return sign * value / divisor if divisor else None
    if match["power"]:
        power = int(match["power"])
        return sign * value * Fraction(10) ** power if abs(power) <= _LARGEST_POWER else None
    return sign * value


def _plain_fraction(match: re.Match[str]) -> str:
    whole, top, top_digit, bottom, bottom_digit = match.groups()
    return f"{whole + ' ' if whole else ''}{top or top_digit}/{bottom or bottom_digit}"
