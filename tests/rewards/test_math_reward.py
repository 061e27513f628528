# SPDX-License-Identifier: Apache-2.0
"""The numeric matcher and math-verify, on made-up styles and on the gold solutions of GSM8K and MATH-500."""

import itertools
import json
import math
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import reward_input

from lit_rl.rewards import MathReward, RewardSelfTestError
from lit_rl.rewards.latex import match_latex
from lit_rl.rewards.numeric import EXTRACTIONS, find_answer, last_boxed, match_numeric, read_gold, read_number

DATA = Path(os.environ.get("LIT_RL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def rows(*parts: str) -> list[dict[str, Any]]:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for line in path.read_text().splitlines()]


# Reading one number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("42", "42"), ("-7", "-7"), ("− 5", "-5"), ("+3", "3"), ("007", "7"), ("5.", "5"), ("(42)", "42")),
        *(("72.50", "72.5"), (".35625", "57/160"), ("3/4", "3/4"), ("-1 / 2", "-1/2"), ("1 3/4", "7/4")),
        *(("-1 1/2", "-3/2"), ("1,234,567.5", "1234567.5"), ("10{,}080", "10080"), (r"10\,080", "10080")),
        *((r"11,\! 111,\! 111,\! 100", "11111111100"), (r"\frac{1}{2}", "1/2"), (r"-\frac{35}{9}", "-35/9")),
        *((r"\frac{-35}{9}", "-35/9"), (r"\dfrac43", "4/3"), (r"\frac 59", "5/9"), (r"\frac{270}7", "270/7")),
        *((r"1\frac{4}{5}", "9/5"), (r"137 \frac{1}{2}", "275/2"), ("$5", "5"), ("-$5", "-5"), ("$-5", "-5")),
        *((r"\$32,\!348", "32348"), ("$12$", "12"), ("50%", "50"), (r"50\%", "50"), ("90^\\circ", "90")),
        *((r"5.4 \text{ cents}", "5.4"), (r"15\mbox{ cm}^2", "15"), ("60 km/h", "60"), ("42-inch", "42")),
        *(("5m", "5"), ("3 apples.", "3"), ("x=5", "5"), ("2 + 2 = 4", "4"), ("**42**", "42"), ("`42`", "42")),
        *(("2 million", "2000000"), ("1.5 thousand dollars", "1500"), ("3e4", "30000"), ("1.5E-3", "0.0015")),
        *((r"3 \times 10^{4}", "30000"), ("6*10^-2", "0.06"), (r"\boxed{7}", "7"), (r"\text{42}", "42")),
    ],
)
def test_a_number_is_read_exactly(text: str, value: str) -> None:
    assert read_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "3x", "2i", r"2\pi", "2 pi", "2 sqrt(3)", r"3\sqrt{5}", "3 or 4", "3-5", "3, 5", "5:30"),
        *("12/25/2020", "1.2.3", "1/0", r"\frac{1}{0}", "1 1/0", "1,23", "1,234,56", "4210_{5}", "(3,4]"),
        *("2^3", "2+3", "1e999", "9" * 300, "nan", "inf", "1/2/3", r"\frac{x}{2}"),
    ],
)
def test_what_is_not_one_number_is_not_read(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("so 10-3=7 apples.", 7),
        ("He has - 5 apples", 5),
        ("It dropped to -3 degrees", -3),
        ("H2O costs 7, see x2", 7),
        (r"First \boxed{3}, no: \boxed{4}. I checked 9 times.", 4),
        (r"\boxed{4} and then \boxed{", 4),
        (r"\boxed{} gives \boxed{\text{5 apples}}", 5),
        (r"\boxed{\frac{1}{2}} of 8", Fraction(1, 2)),
        (r"It is 3. \boxed{x+1}", None),
        ("#### Step 1: add\nThe sum is 5", 5),
        ("#### 12\nbut\n#### 1,234 dollars", 1234),
        ("The answer is 42 because 6*7.", 42),
        ("**Answer:** $42$ (there were 50)", 42),
        ("the answer is 3 times 5 = 15. Out of 20.", 15),
        ("The answer is the sum of 1 and 2. Answer: 3, not 9", 3),
        ("the final answer is: -$1.50. Yes, 1", Fraction(-3, 2)),
        ("To give the answer as a percentage: 3 of 12 is 25% so 25", 25),
        ("so the final answer is 15 gallons * 8 pints / gallon = <<15*8=120>>120 pints", 120),
        ("24 correct answers * 2 points/answer = <<24*2=48>>48 points.\nIn total 48 + 16 = 64", 64),
        ("nothing here", None),
    ],
)
def test_the_final_answer_is_found(completion: str, value: Any) -> None:
    assert find_answer(completion) == value


def test_only_the_wanted_places_are_searched() -> None:
    text = "it is 5"
    assert match_numeric(text, "5") == 1
    assert match_numeric(text, "5", extraction=("boxed", "hashes", "phrase")) == 0
    assert match_numeric("#### 4\nThe answer is 5", "5", extraction=("phrase", "hashes")) == 1
    with pytest.raises(ValueError, match="nowhere"):
        match_numeric(text, "5", extraction=("nowhere",))  # type: ignore[arg-type]


@pytest.mark.parametrize("gold", [72, 72.0, "72", "72.0", "so 8*9=72\n#### 72", r"thus $\boxed{72}$", "$72"])
def test_gold_answers_of_any_kind_are_read(gold: Any) -> None:
    assert read_gold(gold) == 72


@pytest.mark.parametrize("gold", [None, True, "", "unknown", math.nan, math.inf, [72]])
def test_an_unreadable_gold_answer_is_not_scorable(gold: Any) -> None:
    assert match_numeric("72", gold) is None


def test_tolerance_is_relative_and_exactness_the_default() -> None:
    assert match_numeric("0.333", "1/3") == 0
    assert match_numeric("0.333", "1/3", tolerance=2e-3) == 1
    assert match_numeric("0.1 + 0.2 = 0.3", "0.3") == 1
    assert match_numeric("1000000000000000000001", "1000000000000000000000") == 0


@pytest.mark.parametrize(
    "junk",
    [
        *("1,111" * 20000, "1 " * 50000, "1" * 100000, r"\boxed{" * 20000, "answer is " * 10000, "1/1" * 30000),
        *(r"\frac{1}" * 20000, "{" * 50000, "1" + " " * 100000 + "x", "####" * 20000, r"\text{" * 20000),
        *(r"\boxed{" + "1 " * 50000 + "}", "answer is " + "a " * 50000, "$" * 50000, "1 cm " * 20000),
    ],
)
def test_no_completion_makes_the_search_slow(junk: str) -> None:
    started = time.monotonic()
    assert match_numeric(junk, "3") == 0
    assert time.monotonic() - started < 3


# Every style of a number matches itself and nothing else ------------------------------------------------------------

INTEGER_STYLES = [
    *("{0}", "{0:,}", "{0}.0", "{0}.00", "${0:,}", "{0}%", r"{0}\%", "{0} apples", "{0:,} dollars", r"\${0:,}.00"),
    *(r"{0}\text{{ cm}}", r"{0} \text{{ cm}}^2", "x = {0}", "**{0}**", "{0}/1", r"\frac{{{0}}}{{1}}", "{0}e0"),
    *(r"{0} \times 10^{{0}}", r"{0}^\circ", r"\text{{{0}}}", "  {0}  ", "{0}."),
]
CARRIERS = [
    *(("We get \\boxed{{{}}}.", "boxed"), ("2+2=4\n#### {}", "hashes"), ("#### {}\n", "hashes")),
    *(("The answer is {}", "phrase"), ("**Final answer:** {}", "phrase"), ("so the answer is: ${}$.", "phrase")),
]


@given(st.integers(-(10**12), 10**12), st.sampled_from(INTEGER_STYLES), st.sampled_from(CARRIERS))
@settings(deadline=None, max_examples=400)
def test_an_integer_in_any_style_matches_itself_only(value: int, style: str, carrier: tuple[str, Any]) -> None:
    completion = "There are 17 of 3. " + carrier[0].format(style.format(value))
    for places in (EXTRACTIONS, (carrier[1],)):
        assert match_numeric(completion, str(value), extraction=places) == 1
        assert match_numeric(completion, f"#### {value + 1:,}", extraction=places) == 0


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=500), st.sampled_from(CARRIERS))
@settings(deadline=None, max_examples=200)
def test_a_fraction_in_any_style_matches_itself_only(value: Fraction, carrier: tuple[str, Any]) -> None:
    top, bottom = value.numerator, value.denominator
    whole, rest = divmod(abs(top), bottom)
    sign = "-" if value < 0 else ""
    styles = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}"]
    if whole:
        styles += [f"{sign}{whole} {rest}/{bottom}", rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}"]
    for style in styles:
        completion = carrier[0].format(style)
        assert match_numeric(completion, f"{top}/{bottom}") == 1
        assert match_numeric(completion, str(value + 1)) == 0


@given(st.decimals(min_value=-(10**6), max_value=10**6, places=4))
@settings(deadline=None, max_examples=200)
def test_a_decimal_at_the_end_of_a_text_matches_itself_only(value: Any) -> None:
    for style in (f"{value}", f"{value:,}", f"{value}00", f"${value}", f"{value} km."):
        assert match_numeric(f"In 3 steps it becomes {style}", str(value)) == 1
        assert match_numeric(f"In 3 steps it becomes {style}", str(value + 1)) == 0


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=300)
def test_no_text_raises(text: str) -> None:
    assert match_numeric(text, "42") in (0.0, 1.0)
    assert match_numeric("42", text) in (None, 0.0, 1.0)
    last_boxed(text)


# The reward ---------------------------------------------------------------------------------------------------------


def test_verify_and_batch() -> None:
    reward = MathReward(answer_column="solution")
    assert reward.verify("#### 42", "42") == 1
    assert reward.verify("#### 41", "42") == 0
    assert math.isnan(reward.verify("#### 42", "no idea"))
    batch = reward_input(
        ["It is 5", "5 apples", "6", "5"], finished=[True, False, True, False], solution=[5, 5, 5, "?"]
    )
    assert reward(batch)[:3].tolist() == [1, 1, 0]
    assert MathReward("solution", require_finished=True)(batch)[:3].tolist() == [1, 0, 0]
    assert MathReward("solution", require_finished=True)(batch)[3].isnan()
    assert not reward.failures


@pytest.mark.parametrize(
    "arguments", [{}, {"extraction": ["boxed"]}, {"require_finished": True}, {"isolate": True, "workers": 1}]
)
def test_the_reward_passes_its_own_test(arguments: dict) -> None:
    reward = MathReward(**arguments)
    reward.self_test()
    assert reward.verifier
    reward.close()


@pytest.mark.parametrize("always", [0.0, 1.0])
def test_the_self_test_catches_a_verifier_that_always_says_the_same(always: float) -> None:
    class Broken(MathReward):
        def row_function(self) -> Any:
            return lambda completion, answer: always

    with pytest.raises(RewardSelfTestError, match="'math' failed its self-test"):
        Broken().self_test()


@pytest.mark.parametrize(
    "arguments",
    [
        *({"backend": "sympy"}, {"extraction": []}, {"extraction": ["nowhere"]}, {"tolerance": -1}, {"timeout": 0}),
        *({"backend": "math_verify", "tolerance": 0.1}, {"backend": "math_verify", "extraction": ["boxed"]}),
    ],
)
def test_bad_arguments_are_refused(arguments: dict) -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        MathReward(**arguments)


def test_a_missing_math_verify_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lit-rl\[math\]"):
        MathReward(backend="math_verify")


# math-verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "completion", "value"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", 1),
        (r"3\sqrt{13}", r"so \boxed{\sqrt{117}}", 1),
        (r"\text{(C)}", r"\boxed{C}", 1),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
        ("1,-2", r"\boxed{-2, 1}", 1),
        (r"90^\circ", r"\boxed{90}", 1),
        (r"\$18.90", "The final answer is $18.90$.", 1),
        (r"x^2-1 = \boxed{(x-1)(x+1)}", r"\boxed{x^2-1}", 1),
        ("5", r"\boxed{6}", 0),
        ("5", r"it is 5 or \boxed{6}", 0),
        ("5", "no number", 0),
        ("5", "", 0),
        (r"\frac{\pi}{3}", r"\boxed{\frac{\pi}{2}}", 0),
        ("(3,4]", r"\boxed{[3,4]}", 0),
        ("", r"\boxed{5}", None),
        (None, r"\boxed{5}", None),
    ],
)
def test_latex_is_compared_by_meaning(gold: Any, completion: str, value: float | None) -> None:
    pytest.importorskip("math_verify")
    assert match_latex(completion, gold) == value


def test_latex_runs_isolated_with_a_time_limit() -> None:
    pytest.importorskip("math_verify")
    reward = MathReward(backend="math_verify", timeout=2.0, workers=1)
    reward.self_test()
    tower = r"\boxed{" + "9^{" * 6 + "9" + "}" * 6 + "}"
    with pytest.warns(RuntimeWarning, match="could not score 1 row"):
        values = reward(reward_input([r"\boxed{\frac12}", tower, r"\boxed{2}"], answer=["0.5"] * 3))
    assert values[[0, 2]].tolist() == [1, 0]
    assert values[1].isnan()
    assert sum(reward.failures.values()) == 1
    assert reward.verify(r"\boxed{\frac12}", "0.5") == 1
    reward.close()


# Gold solutions of the public sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "size"), [("test", 1319), ("train", 7473)])
def test_every_gold_solution_of_gsm8k_is_right_and_the_next_number_is_wrong(split: str, size: int) -> None:
    problems = rows("gsm8k", f"{split}.jsonl")
    assert len(problems) == size
    reward = MathReward()
    for problem in problems:
        solution = problem["answer"]
        text, _, answer = solution.rpartition("####")
        wrong = f"#### {int(answer.replace(',', '')) + 1:,}"
        assert reward.verify(solution, solution) == 1, solution
        assert reward.verify(solution, wrong) == 0, solution
        for style in ("The answer is ${}.", "\\boxed{{{}}}", "{}"):
            completion = text + style.format(answer.strip())
            assert find_answer(completion) == int(answer.replace(",", "")), completion


def test_every_gold_answer_of_svamp_and_amc_is_read() -> None:
    reward = MathReward()
    for path, column in (("svamp", "Answer"), ("amc23", "answer"), ("aime24", "answer")):
        for problem in rows(path, "test.jsonl"):
            gold = problem[column]
            assert reward.verify(f"The answer is {float(gold)}.", gold) == 1
            assert reward.verify(f"The answer is {float(gold) + 1}.", gold) == 0


@pytest.mark.parametrize("same_text", [True, False])
def test_every_gold_solution_of_math500_is_right(same_text: bool) -> None:
    pytest.importorskip("math_verify")
    problems = rows("math500", "test.jsonl")
    assert len(problems) == 500
    for problem in problems:
        assert match_latex(problem["solution"], problem["answer"], same_text=same_text) == 1, problem["unique_id"]


def test_wrong_answers_to_math500_are_refused() -> None:
    pytest.importorskip("math_verify")
    problems = rows("math500", "test.jsonl")
    reward = MathReward(backend="math_verify")
    numbers = [(p, int(p["answer"])) for p in problems if p["answer"].lstrip("-").isdigit()]
    completions = [p["solution"] + rf" \boxed{{{number + 1}}}" for p, number in numbers]
    answers = [p["answer"] for p, _ in numbers]
    others = [(a, b) for a, b in itertools.pairwise(problems) if not _alike(a["answer"], b["answer"])]
    completions += [b["solution"] for _, b in others]
    answers += [a["answer"] for a, _ in others]
    assert len(numbers) == 311
    values = reward(reward_input(completions, answer=answers))
    reward.close()
    assert not reward.failures
    accepted = [(a, c[-60:]) for a, c, value in zip(answers, completions, values.tolist()) if value != 0]
    assert not accepted


def _alike(a: str, b: str) -> bool:
    """Whether two answers have the same value: ``x=5`` and ``5`` do."""
    return a.rpartition("=")[2].replace(" ", "") == b.rpartition("=")[2].replace(" ", "")
