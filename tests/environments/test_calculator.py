# SPDX-License-Identifier: Apache-2.0
"""The calculator is exact, bounded, and evaluates nothing but arithmetic."""

import random
from fractions import Fraction

import pytest

from lit_rl.environments import CalculatorEnvironment
from lit_rl.environments.calculator import evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2", "3"),
        (" 7 / 2 ", "3.5"),
        ("1/3", "0.3333333333"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2**10", "1024"),
        ("2 ** -2", "0.25"),
        ("0.1 + 0.2", "0.3"),
        ("+(3-(4))", "-1"),
        ("12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900"),
    ],
)
def test_values(expression, value):
    assert evaluate(expression) == value


def test_random_expressions_against_fractions():
    rng = random.Random(0)
    for _ in range(200):
        numbers = [rng.randint(1, 99) for _ in range(4)]
        operators = [rng.choice("+-*/") for _ in range(3)]
        text = "".join(f"{n}{o}" for n, o in zip(numbers, [*operators, ""]))
        exact = eval("".join(f"Fraction({n}){o}" for n, o in zip(numbers, [*operators, ""])), {"Fraction": Fraction})
        assert float(evaluate(text)) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    "expression",
    [
        "", "1+", "x", "__import__('os')", "len('a')", "(1).real", "True", "1j", "[1]", "1 if 1 else 2", "'a'*3",
        "9**9**9", "2**0.5", "1e999", "9" * 201, "(" * 150 + "1", "1<2", "lambda: 1", "2**4000*2**4000", "1e308*10/3",
    ],
)  # fmt: skip
def test_anything_else_is_an_error(expression):
    with pytest.raises((ValueError, ZeroDivisionError)):
        evaluate(expression)


def answer(text: str, **tags: str):
    return CalculatorEnvironment(**tags).start({}, 0).step(text)


def test_a_call_is_answered_between_tags():
    assert answer("I think <calc>6*7</calc>").observation == "<result>42</result>"
    assert answer("<calc>1<calc>2+2</calc>").observation == "<result>4</result>", "the last opening tag counts"
    assert answer("6*7=", opening="", closing="=", result=" {}").observation == " 42"


def test_errors_are_answers():
    turn = answer("<calc>1/0</calc>")
    assert not turn.done
    assert turn.observation.startswith("<result>error: ")
    assert "not an arithmetic expression" in answer("<calc>os</calc>").observation


def test_a_turn_without_a_call_ends_the_episode():
    for text in ("the answer is 42", "<calc>6*7</calc> is 42", "6*7</calc>"):
        assert answer(text).done


def test_tags_are_checked():
    with pytest.raises(ValueError, match="closing"):
        CalculatorEnvironment(closing="")
    with pytest.raises(ValueError, match="result"):
        CalculatorEnvironment(result="x")
