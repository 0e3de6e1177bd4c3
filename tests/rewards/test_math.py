"""Equality in value, through the math-verify process."""

import select
import threading
import time

import pytest

from longrl.rewards import math as math_reward
from longrl.rewards.math import is_equal, last_boxed, math, math_lenient
from longrl.rewards.time_limit import TimeIsUp, call_within
from longrl.types import Completion, Row


def said(text: str) -> Completion:
    return Completion((), (), text, "stop")


def row(answer: str) -> Row:
    return Row(id="1", problem="?", answer=answer, task="math")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\sqrt{2}", "sqrt(2)"),
        ("x^2+1", "1 + x^2"),
        ("1,234", "1234"),
        ("12", "$12$"),
        ("12", "12 apples"),
        ("12", "The answer is 12."),
        ("(1,2)", "(1, 2)"),
        ("x=3", "3"),
    ],
)
def test_equal_values_are_equal(gold, answer):
    assert is_equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), [("12", "13"), ("12", "12 or 13"), ("12", "13, 12"), ("1/3", "0.33")])
def test_other_values_and_lists_of_guesses_are_not(gold, answer):
    assert not is_equal(gold, answer)


def test_the_answer_tag_goes_before_the_box_and_lenient_reads_on():
    assert math(said(r"<think>\boxed{3}</think><answer>4</answer>"), row("4")) == 1.0
    assert math(said(r"<think>x</think>So \boxed{\frac{8}{2}}."), row("4")) == 1.0
    assert math(said(r"<think>\boxed{4}</think>"), row("4")) == 0.0
    assert math(said("it is 4"), row("4")) == 0.0
    assert math_lenient(said("2 rows of 2, so it is 4."), row("4")) == 1.0
    assert math_lenient(said(""), row("4")) == 0.0


def test_the_last_box_is_read_with_its_braces():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("no box") is None


def test_it_works_outside_the_main_thread_and_leaves_no_alarm():
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(is_equal("1/2", "0.50"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True, True]


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged(monkeypatch, caplog):
    monkeypatch.setattr(math_reward, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(math_reward, "is_absurd", lambda formula: False)
    with caplog.at_level("WARNING"):
        assert not is_equal("5", "9^{9^{9^{9}}}")
    assert "counts as wrong" in caplog.text
    monkeypatch.setattr(math_reward, "TIMEOUT_S", 10.0)
    assert is_equal("0.5", "1/2")


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", "2^{100000}", "((9^9)^9)^9", "99999!", "(9!)!", "(x+y+z)^{999}", "9" * 200, "x+" * 400]
)
def test_what_would_take_for_ever_is_refused_unasked(answer, monkeypatch):
    monkeypatch.setattr(math_reward._WORKER, "ask", lambda request: pytest.fail("asked"))
    assert not is_equal("x^2", answer)


def test_numbers_and_words_need_no_algebra(monkeypatch):
    monkeypatch.setattr(math_reward._WORKER, "ask", lambda request: pytest.fail("asked"))
    assert is_equal("42", "**42 cm**")
    assert is_equal(r"\frac{1}{2}", "0.5")
    assert is_equal(r"\text{Yes}", "yes.")
    assert not is_equal("42", "at least 42")
    assert not is_equal("5", "4=5")


def test_of_a_long_answer_a_number_is_read_from_the_end_but_no_formula():
    words = "we count on and on, " * 200
    assert is_equal("42", f"{words}so the answer is 42")
    assert not is_equal("x^2", f"{words}x^2")


def test_an_unreadable_ground_truth_is_an_error():
    with pytest.raises(ValueError, match=r"ground truth '\$\$'.*correct the row"):
        is_equal("$$", "5")


def test_a_comparison_that_is_stopped_leaves_no_reply_for_the_next(monkeypatch):
    assert is_equal("x^2 - 1", "(x-1)(x+1)")
    waits = select.select
    monkeypatch.setattr("select.select", lambda *args: time.sleep(60))
    with pytest.raises(TimeIsUp):
        call_within(0.1, is_equal, "y^2 - 1", "(y-1)(y+1)")
    monkeypatch.setattr("select.select", waits)
    assert not is_equal("x^2 - 1", "(x-1)(x+2)")
