"""Numbers and exact texts."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.exact import exact, exact_lenient, normalized_text
from longrl.rewards.numeric import mean_relative_accuracy, number, numbers, numeric, numeric_lenient
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
        ("1,2345", [1, 2345]),
        ("3/4", [0.75]),
        ("1e-3", [0.001]),
        ("3-5", [3, 5]),
        ("50%", [50]),
        ("The answer is 5.", [5]),
        ("$20", [20]),
        ("Twelve cups", [12]),
        ("one of 7", [7]),
        ("model v1.5", []),
        ("none", []),
        ("1/0", [float("inf")]),
    ],
)
def test_numbers_are_read(text, values):
    assert numbers(text) == pytest.approx(values)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9))
def test_a_written_number_is_read_back(value):
    assert number(f"about {value!r} s") == pytest.approx(value)


def test_several_different_numbers_are_no_answer():
    assert number("12 or 13") is None
    assert number("12, that is 12.0") == 12


def test_numeric_has_a_tolerance_that_a_row_can_set():
    assert numeric(tagged("3.145"), row("3.14")) == 1.0
    assert numeric(tagged("3.15"), row("3.14")) == 0.0
    assert numeric(tagged("3.3"), row("3.14", tolerance=0.2)) == 1.0
    assert numeric(said("3.14"), row("3.14")) == 0.0


def test_numeric_lenient_takes_the_last_number():
    assert numeric_lenient(said("3 rows of 4 make 12."), row("12")) == 1.0
    assert numeric_lenient(tagged("12 or 13"), row("13")) == 0.0
    assert numeric_lenient(said("no idea"), row("12")) == 0.0


def test_a_numeric_row_without_a_number_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="must be one number, got 'many'; correct the row"):
        numeric(tagged("3"), row("many"))


def test_mean_relative_accuracy_counts_thresholds():
    assert mean_relative_accuracy(tagged("10"), row("10")) == 1.0
    assert mean_relative_accuracy(tagged("12.2"), row("10")) == pytest.approx(0.6)  # 0.22 < 0.5, 0.45, .. 0.25
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


def test_texts_that_normalise_to_nothing_stay_different():
    assert normalized_text("a") != normalized_text("the") != normalized_text("-")
    assert normalized_text("3.5") != normalized_text("35")
