# SPDX-License-Identifier: Apache-2.0
r"""Rows of well-known datasets as records with the same columns: functions for the ``map`` of a `Source`.

Questions come out as ``problem``, final answers as ``answer`` (what `lit_rl.rewards.MathReward` reads) and worked
solutions as ``solution``; everything else is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lit_rl.data import Record
from lit_rl.rewards.numeric import last_boxed

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def gsm8k(record: Record) -> Record:
    """GSM8K: ``question``, and ``answer`` with the solution, calculator notes ``<<…>>`` and ``#### number``.

    >>> gsm8k({"question": "2 pens for $3?", "answer": "2*3=<<2*3=6>>6\\n#### 6"})
    {'problem': '2 pens for $3?', 'answer': '6', 'solution': '2*3=6'}
    """
    record = dict(record)
    solution, marker, answer = record.pop("answer").rpartition("####")
    if not marker:
        raise ValueError("The column 'answer' has no '####': this row is not in the format of GSM8K.")
    solution = _CALCULATOR.sub("", solution).strip()
    return {"problem": record.pop("question"), **record, "answer": answer.strip(), "solution": solution}


def math(record: Record) -> Record:
    r"""MATH, MATH-500, AIME, AMC: ``problem`` (or ``question``), ``answer``, or a ``solution`` with the answer boxed.

    >>> math({"problem": "1+1?", "solution": r"It is $\\boxed{2}$."})["answer"]
    '2'
    """
    problem = record["problem"] if "problem" in record else record["question"]
    answer = record.get("answer")
    if answer is None:
        answer = last_boxed(record["solution"])
    if answer is None:
        raise ValueError(r"There is neither a column 'answer' nor a \boxed{} in the column 'solution'.")
    return {**record, "problem": problem, "answer": plain_number(answer)}


def svamp(record: Record) -> Record:
    """SVAMP: ``Body``, ``Question`` and ``Answer``.

    >>> svamp({"Body": "Ann has 3 pens", "Question": "How many?", "Answer": 3.0})["problem"]
    'Ann has 3 pens. How many?'
    """
    record = dict(record)
    body, question, answer = (record.pop(name) for name in ("Body", "Question", "Answer"))
    body = body.strip()
    separator = " " if body.endswith((".", "!", "?")) else ". "
    return {**record, "problem": f"{body}{separator}{question.strip()}", "answer": plain_number(answer)}


def plain_number(answer: Any) -> str:
    """An answer as text; a whole number without ``.0``.

    >>> plain_number(145.0), plain_number("3.50")
    ('145', '3.50')
    """
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def conversation(record: Record) -> Record:
    """A column ``messages`` that ends with the assistant's turn: all before it is the prompt, it is the completion.

    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> conversation({"messages": turns})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'completion': 'Hello'}
    """
    record = dict(record)
    *prompt, last = record.pop("messages")
    if last["role"] != "assistant" or not prompt:
        raise ValueError("The column 'messages' must hold a conversation that ends with a message of the assistant.")
    return {**record, "prompt": prompt, "completion": last["content"]}


@dataclass
class Continuation:
    """Plain text for next-token replay: its beginning is the prompt, the rest is the completion.

    Args:
        column: the column with the text.
        head: characters that the prompt has at least; it ends with the word there.

    >>> Continuation(head=5)({"text": "Once upon a time"})
    {'prompt': 'Once upon', 'completion': ' a time'}
    """

    column: str = "text"
    head: int = 32

    def __post_init__(self) -> None:
        if self.head < 1:
            raise ValueError(f"head must be at least 1 character (a policy needs something to go on), got {self.head}.")

    def __call__(self, record: Record) -> Record | None:
        """The record with ``prompt`` and ``completion``; None for a text too short to be divided."""
        record = dict(record)
        text = record.pop(self.column)
        end = re.compile(r"\s").search(text, self.head)
        if end is None:
            return None
        return {**record, "prompt": text[: end.start()], "completion": text[end.start() :]}
