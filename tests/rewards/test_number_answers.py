"""A corpus of answers that hold numbers, formulas and intervals, with what a reader says each means.

`numeric` and `math`: the answer is right or wrong for `gold`. `numeric_value`: the number of the text, null if a
careful reader would not name one. `temporal_intervals`: all intervals of the text in seconds.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longrl.rewards.math import math as math_accuracy, math_lenient
from longrl.rewards.numeric import number, numeric, numeric_lenient
from longrl.rewards.time_intervals import parse_intervals
from longrl.types import Completion, Row

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "number_answers.jsonl").read_text().splitlines()]
MAX_MISSES = 0.02


def said(text: str) -> Completion:
    return Completion((), (), text, "stop")


def is_read(case: dict[str, Any]) -> bool:
    text = case["answer_text"]
    if case["task"] == "numeric_value":
        value, wanted = number(text), case["value"]
        return value is wanted if value is None or wanted is None else math.isclose(value, wanted)
    if case["task"] == "temporal_intervals":
        intervals = [tuple(each) for each in case["intervals"]]
        return parse_intervals(text) == [pytest.approx(each) for each in intervals]
    judge = numeric if case["task"] == "numeric" else math_accuracy
    row = Row("1", "?", case["gold"], task=case["task"])
    return judge(said(f"<think>x</think><answer>{text}</answer>"), row) == case["right"]


@pytest.mark.parametrize("task", ["numeric", "numeric_value", "math", "temporal_intervals"])
def test_at_most_two_answers_of_a_hundred_are_misread(task):
    cases = [case for case in CORPUS if case["task"] == task]
    misses = [case for case in cases if not is_read(case)]
    assert len(cases) >= 150
    assert len(misses) <= MAX_MISSES * len(cases), misses


def test_a_wrong_answer_is_never_taken_for_a_right_one():
    wrong = [case for case in CORPUS if case.get("right") == 0]
    assert len(wrong) >= 200
    assert [case for case in wrong if not is_read(case)] == []


def test_no_number_is_read_where_a_reader_names_none():
    unread = [case for case in CORPUS if case["task"] == "numeric_value" and case["value"] is None]
    assert len(unread) >= 400
    assert len([case for case in unread if not is_read(case)]) <= 0.01 * len(unread)


def test_a_strict_answer_is_right_for_the_lenient_judge_too():
    for case in CORPUS:
        if case.get("right") == 1:
            row = Row("1", "?", case["gold"], task=case["task"])
            strict, lenient = {"numeric": (numeric, numeric_lenient), "math": (math_accuracy, math_lenient)}[
                case["task"]
            ]
            answer = said(f"<answer>{case['answer_text']}</answer>")
            assert lenient(answer, row) == strict(answer, row)
