# SPDX-License-Identifier: Apache-2.0
"""A calculator as a tool: the policy writes an expression between two tags and reads its value."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from lit_rl.environments.base import Environment, Episode, Turn

_MAX_LENGTH = 200  # characters of an expression
_MAX_BITS = 4096  # size of a number
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class CalculatorEnvironment(Environment):
    """Evaluates what stands between ``opening`` and ``closing``; a turn without a call ends the episode.

    An expression that cannot be evaluated is answered with an error message, which is part of the game and no failure.

    Args:
        opening: tag before an expression; empty: the whole turn is the expression.
        closing: tag after it. It ends the policy's turn.
        result: the answer, ``{}`` standing for the value.

    Raises:
        ValueError: ``closing`` is empty, or ``result`` has no ``{}``.
    """

    def __init__(self, opening: str = "<calc>", closing: str = "</calc>", result: str = "<result>{}</result>") -> None:
        if not closing:
            raise ValueError("closing must not be empty: it tells where an expression ends.")
        if "{}" not in result:
            raise ValueError(f"result must contain {{}}, which stands for the value, got {result!r}.")
        self.opening, self.closing, self.result = opening, closing, result
        self.stop = (closing,)

    def start(self, record: dict[str, Any], seed: int) -> Episode:
        return _Calculation(self)


class _Calculation(Episode):
    def __init__(self, calculator: CalculatorEnvironment) -> None:
        self.calculator = calculator

    def step(self, text: str) -> Turn:
        opening, closing = self.calculator.opening, self.calculator.closing
        if not text.endswith(closing):
            return Turn(done=True)
        text = text.removesuffix(closing)
        start = text.rfind(opening) if opening else 0
        if start < 0:
            return Turn(done=True)
        try:
            value = evaluate(text[start + len(opening) :])
        except (ValueError, ZeroDivisionError) as error:
            value = f"error: {error}"
        return Turn(self.calculator.result.replace("{}", value))


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression (``+ - * / // % **``, parentheses), exact, as text.

    >>> evaluate("(2 + 3) * 4"), evaluate("7 / 2"), evaluate("2 ** 10")
    ('20', '3.5', '1024')

    Raises:
        ValueError: it is no such expression, or its numbers get too large.
        ZeroDivisionError: division by zero.
    """
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"longer than {_MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not an arithmetic expression") from None
    value = _value(tree)
    try:
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"
    except OverflowError:
        raise ValueError("number too large") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        if abs(node.value) == float("inf"):
            raise ValueError("number too large")
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATIONS:
            return _bounded(Fraction(_OPERATIONS[type(node.op)](left, right)))
    raise ValueError("not an arithmetic expression")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("exponent is not an integer")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent.numerator) > _MAX_BITS:
        raise ValueError("number too large")
    return Fraction(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("number too large")
    return value
