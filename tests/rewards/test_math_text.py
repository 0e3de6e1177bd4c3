"""One spelling of formulas, and what no system should be asked."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.math_statements import compare_statements
from longrl.rewards.math_text import MAX_CHARS, is_absurd, plain_formula


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("**x\u00b2 + 2\u221a3.**", r"x^{2} + 2\sqrt{3}"),
        ("The answer is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("2^10", "2^{10}"),
        ("0.1\\overline{3}", r"\frac{2}{15}"),
        ("0.333...", r"\frac{1}{3}"),
        ("1.2 x 10^3", r"1.2\times 10^3"),
        ("1e-3", r"1\times 10^{-3}"),
        ("x >= 3", r"x \geq 3"),
        ("\\text{Yes}", "Yes"),
        ("10 000", "10000"),
        ("x**2", "x^2"),
    ],
)
def test_formulas_have_one_spelling(text, formula):
    assert plain_formula(text).replace("  ", " ") == formula


@given(st.text(max_size=300).map(lambda text: text * 20))
def test_any_text_has_a_formula_of_bounded_length(text):
    assert len(plain_formula(text)) <= 8 * MAX_CHARS


@pytest.mark.parametrize("formula", ["9^{9^{9}}", "2^{100000}", "10000!", "5!!", "9" * 101, "((9^9)^9)^9", "(" * 201])
def test_towers_and_endless_digits_are_absurd(formula):
    assert is_absurd(formula)


@pytest.mark.parametrize("formula", ["2^{10}", "e^{-x^2}", "x^{100}", "5!", r"\frac{1}{2}", "10^{21}", "(x+1)^{10}"])
def test_usual_formulas_are_not(formula):
    assert not is_absurd(formula)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("42", "42 apples", True),
        ("42", "not 42", False),
        ("42", "12 or 42", False),
        ("5", "4 = 5", False),
        ("Yes", "no", False),
        ("C", "(c)", True),
        ("3:2", "3 to 2", True),
        ("x^2", "x^2 or x", False),
        ("x^2", "x*x", None),
        ("42", "6x", None),
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_statements_are_compared_without_algebra_where_that_is_enough(gold, answer, verdict):
    assert compare_statements(gold, answer) is verdict
