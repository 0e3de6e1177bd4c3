"""Which judge is asked, and what ground truths are refused."""

import pytest

from longrl.rewards import accuracy, accuracy_lenient, check_answer
from longrl.rewards.tasks import ACCURACY, LENIENT_ACCURACY
from longrl.types import Completion, Row

CHOICES = "Which?\nA. cat\nB. dog"
RIGHT = {
    "multiple_choice": (CHOICES, "B", "dog"),
    "math": ("?", "1/2", "0.5"),
    "numeric": ("?", "3", "three"),
    "exact": ("?", "Paris", "paris."),
    "temporal_iou": ("?", "0:10-0:20", "10 to 20 s"),
}


@pytest.mark.parametrize("task", RIGHT)
def test_each_task_has_its_judge(task):
    problem, answer, said = RIGHT[task]
    row = Row(id="1", problem=problem, answer=answer, task=task)
    check_answer(row)
    assert accuracy(Completion((), (), f"<answer>{said}</answer>", "stop"), row) == 1.0
    assert accuracy(Completion((), (), said, "stop"), row) == 0.0
    assert accuracy_lenient(Completion((), (), said, "stop"), row) == 1.0


def test_strict_and_lenient_judges_cover_the_same_tasks():
    assert ACCURACY.keys() == LENIENT_ACCURACY.keys() == RIGHT.keys()


def test_an_unknown_task_is_an_error_that_names_the_known_ones():
    row = Row(id="7", problem="?", answer="x", task="open_ended")
    with pytest.raises(ValueError, match=r"row '7'.*multiple_choice, math, .*got 'open_ended'"):
        accuracy(Completion((), (), "x", "stop"), row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(id="7", problem=CHOICES, answer="C"), r"row '7'.*one of the options A, B, got 'C'; correct the row"),
        (Row(id="7", problem=CHOICES, answer="dog"), r"got 'dog'"),
        (Row(id="7", problem="Which?", answer="A"), r"must list its options from A on.*'A\. text'"),
        (Row(id="7", problem=CHOICES, answer=" "), r"must not be empty"),
        (Row(id="7", problem="?", answer="many", task="numeric"), r"must be one number, got 'many'"),
        (Row(id="7", problem="?", answer="noon", task="temporal_iou"), r"must hold an interval .*got 'noon'"),
    ],
)
def test_a_ground_truth_that_cannot_be_judged_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        check_answer(row)


def test_open_ended_rows_pass_the_check():
    check_answer(Row(id="7", problem="Why?", answer="Because.", task="open_ended"))
