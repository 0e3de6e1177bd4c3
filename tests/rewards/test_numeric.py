"""Numbers and exact texts."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.exact import exact, exact_lenient, normalized_text
from longrl.rewards.numeric import (
    mean_relative_accuracy,
    number,
    numbers,
    numeric,
    numeric_lenient,
    regression_accuracy,
    regression_accuracy_lenient,
)
from longrl.types import Completion, Row


def said(text: str) -> Completion:
    return Completion((), (), text, "stop")


def tagged(text: str) -> Completion:
    return said(f"<think>x</think><answer>{text}</answer>")


def row(answer: str, task: str = "numeric", **metadata: object) -> Row:
    return Row(id="1", problem="How many?", answer=answer, task=task, metadata=metadata)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("12", [12]),
        ("-0.5", [-0.5]),
        ("\u22123", [-3]),
        (".5 m", [0.5]),
        ("1,234 people", [1234]),
        ("1,2345", [1.2345]),
        ("3/4", [0.75]),
        ("1e-3", [0.001]),
        ("3-5", [None]),
        ("50%", [50]),
        ("The answer is 5.", [5]),
        ("$20", [20]),
        ("Twelve cups", [12]),
        ("one of 7", [None]),
        ("model v1.5", []),
        ("none", [0]),
        ("no idea", []),
        ("1/0", [None]),
        ("3.(3)", [None]),
        ("0.1(6)", [None]),
        ("12. (Or so)", [12]),
    ],
)
def test_numbers_are_read(text, values):
    assert numbers(text) == values


@pytest.mark.parametrize("tail", ["", " 1/2", " and 1/2", "th", "k", " fifths", "/2", " million", "\u4e07"])
def test_a_number_beyond_all_floats_is_none(tail):
    assert number("9" * 400 + tail) is None
    assert number("million " * 60 + tail) is None


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9))
def test_a_written_number_is_read_back(value):
    assert number(f"about {value!r} s") == pytest.approx(value)


@given(st.text() | st.text(alphabet="0123456789.,-+*/^=()[]{}|%$ \\fracsqtnoe\u4e00\u5341\u00bd"))
def test_any_text_gives_a_finite_number_or_none(text):
    value = number(text)
    assert value is None or abs(value) < float("inf")


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from(
    ["{a}-{b}", "{a} to {b}", "between {a} and {b}", "{a} or {b}", "{a}, {b}", "{a} of {b}", "{a} out of {b}",
     "{a}:{b}", "{a} x {b}", "{a} by {b}", "{a} \u00b1 {b}", "from {a} until {b}", "{a} {b}a", "either {a} or {b}"]
))  # fmt: skip
def test_two_numbers_are_never_read_as_one(a, b, form):
    if a != b:
        assert number(form.format(a=a, b=b)) is None


@given(st.floats(0.01, 1e6), st.sampled_from(
    ["not {}", "less than {}", "more than {}", "at least {}", "at most {}", "{}+", "over {}", "up to {}", "< {}",
     "{} or more", "no more than {}", "other than {}", "the square root of {}", "{}e", "{}ab", "log {}"]
))  # fmt: skip
def test_a_number_that_is_denied_bounded_or_cut_is_none(value, form):
    assert number(form.format(round(value, 2))) is None


def test_several_different_numbers_are_no_answer():
    assert number("12 or 13") is None
    assert number("12, that is 12.0") == 12


def test_numeric_has_a_tolerance_that_a_row_can_set():
    assert numeric(tagged("3.145"), row("3.14")) == 1.0
    assert numeric(tagged("3.15"), row("3.14")) == 0.0
    assert numeric(tagged("3.3"), row("3.14", tolerance=0.2)) == 1.0
    assert numeric(said("3.14"), row("3.14")) == 0.0


def test_a_percentage_is_right_as_a_share_of_one_or_of_a_hundred():
    assert numeric(tagged("50%"), row("50")) == numeric(tagged("50%"), row("0.5")) == 1.0
    assert numeric(tagged("0.5"), row("50%")) == numeric(tagged("50"), row("50%")) == 1.0
    assert numeric(tagged("5%"), row("0.5")) == numeric(tagged("0.5"), row("50")) == 0.0


def test_regression_falls_with_the_relative_error_as_video_r1_grades_it():
    assert regression_accuracy(tagged("10"), row("10", "regression")) == 1.0
    assert regression_accuracy(tagged("12"), row("10", "regression")) == pytest.approx(0.8)
    assert regression_accuracy(tagged("-5 m"), row("10", "regression")) == 0.0
    assert regression_accuracy(tagged("9 or 10"), row("10", "regression")) == 0.0
    assert regression_accuracy(tagged("0"), row("0", "regression")) == 1.0
    assert regression_accuracy(said("about 12"), row("10", "regression")) == 0.0
    assert regression_accuracy_lenient(said("about 12"), row("10", "regression")) == pytest.approx(0.8)


def test_numeric_lenient_takes_the_last_number():
    assert numeric_lenient(said("3 rows of 4 make 12."), row("12")) == 1.0
    assert numeric_lenient(tagged("12 or 13"), row("13")) == 0.0
    assert numeric_lenient(said("no idea"), row("12")) == 0.0
    assert numeric_lenient(said("3 red and 2 blue, so 5. The 2 are small."), row("5")) == 1.0
    assert numeric_lenient(said("It is 11 or 12."), row("12")) == 0.0


def test_a_numeric_row_without_a_number_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="must be one number, got 'many'; correct the row"):
        numeric(tagged("3"), row("many"))


def test_mean_relative_accuracy_counts_thresholds():
    assert mean_relative_accuracy(tagged("10"), row("10")) == 1.0
    assert mean_relative_accuracy(tagged("12.2"), row("10")) == pytest.approx(0.6)  # 0.22 < 0.5, 0.45, .. 0.25
    # Equal to a threshold is not below it: 0.45 of 3, 0.4 of 1.7 and 0.25 of 2.4.
    for said, gold, share in (("4.35", "3", 0.1), ("2.38", "1.7", 0.2), ("1.8", "2.4", 0.5)):
        assert mean_relative_accuracy(tagged(said), row(gold)) == share
    assert mean_relative_accuracy(tagged("16"), row("10")) == 0.0
    assert mean_relative_accuracy(tagged("0"), row("0")) == 1.0
    assert mean_relative_accuracy(tagged("x"), row("10")) == 0.0


def test_exact_ignores_case_articles_punctuation_and_spaces():
    assert exact(tagged("The  red, Car!"), row("a red car", task="exact")) == 1.0
    assert exact(tagged("red cars"), row("red car", task="exact")) == 0.0
    assert exact(said("red car"), row("red car", task="exact")) == 0.0
    assert exact_lenient(said("red car"), row("red car", task="exact")) == 1.0
    assert exact(tagged("auto"), row("car", task="exact", aliases=["auto"])) == 1.0
    assert exact(tagged(""), row("a", task="exact")) == 0.0


def test_a_long_text_is_equal_to_none_unless_the_accepted_one_is_as_long():
    long = "word " * 1000
    assert exact(tagged(f"car {'!' * 5000}"), row("car", task="exact")) == 0.0
    assert exact(tagged(long), row(long.upper(), task="exact")) == 1.0


def test_texts_that_normalise_to_nothing_stay_different():
    assert normalized_text("a") != normalized_text("the") != normalized_text("-")
    assert normalized_text("3.5") != normalized_text("35")
