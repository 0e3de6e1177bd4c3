"""Sample records and their files."""

import pytest
import torch

from longrl.evaluation.records import group_records
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Completion, Group, Media, Prompt, Row

ROW = Row(
    id="q1",
    problem="Which?\nA. cat\nB. dog",
    answer="B",
    category="spatial",
    videos=("clips/7.mp4", "clips/8.mp4"),
)


def group(*texts: str, row: Row = ROW, finish_reason: str = "stop") -> Group:
    media = Media("video", torch.zeros(8, 4), (2, 2, 2), 1.0, (0.5, 1.5), "key")
    ids, positions = torch.zeros(9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    prompt = Prompt("q1", ids, positions, (media,), row, frame_indices=((0, 5, 10, 15),))
    return Group(prompt, [Completion(torch.zeros(5), torch.zeros(5), text, finish_reason) for text in texts])


def test_a_record_holds_what_was_asked_said_and_scored():
    scored = group("<think>x</think><answer>dog</answer>", finish_reason="length")
    RewardSum([RewardTerm("longrl.rewards.accuracy", 2.0)]).score([scored])
    assert group_records(ROW, scored) == [
        {
            "id": "q1",
            "sample": 0,
            "task": "multiple_choice",
            "category": "spatial",
            "breakdowns": {},
            "video": "7.mp4",
            "answer": "B",
            "prediction": "<think>x</think><answer>dog</answer>",
            "prediction_answer": "dog",
            "letter": "B",
            "accuracy": 1.0,
            "accuracy_lenient": 1.0,
            "correct": True,
            "correct_lenient": True,
            "correct_by_rule": None,
            "format": True,
            "rewards": {"accuracy": 1.0},
            "reward": 2.0,
            "finish_reason": "length",
        }
    ]


def test_strict_and_lenient_differ_without_a_tag():
    record = group_records(ROW, group("<answer>A</answer>", "The answer is B"))[1]
    assert (record["correct"], record["correct_lenient"], record["letter"]) == (False, True, None)
    assert record["sample"] == 1
    assert (record["reward"], record["rewards"]) == (None, {})


def test_temporal_answers_are_right_from_an_overlap_of_one_half():
    row = Row(id="q1", problem="When?", answer="0-10", task="temporal_iou")
    close, far = group("<answer>0 to 6 s</answer>", row=row), group("<answer>0 to 4 s</answer>", row=row)
    assert [group_records(row, each)[0]["correct"] for each in (close, far)] == [True, False]
    assert group_records(row, far)[0]["accuracy"] == pytest.approx(0.4)
    assert group_records(row, far)[0]["letter"] is None
    assert group_records(row, far)[0]["video"] == ""


def test_a_task_without_a_judge_takes_the_accuracy_of_the_rewards_or_stays_unjudged():
    row = Row(id="q1", problem="Why?", answer="Because.", task="open_ended")
    judged = group("x", row=row)
    assert group_records(row, judged)[0]["correct"] is None
    judged.reward_parts = {"accuracy": torch.tensor([1.0])}
    assert group_records(row, judged)[0]["correct"] is True


def test_a_judge_of_free_answers_goes_before_the_rule_that_counts_words():
    row = Row(id="q1", problem="Why?", answer="because he is tired", task="free_form")
    answers = group("<answer>since he is weary</answer>", row=row)
    assert 0 < group_records(row, answers)[0]["accuracy"] < 0.5
    answers.reward_parts = {"accuracy": torch.tensor([1.0])}
    assert group_records(row, answers)[0]["accuracy"] == 1.0


def test_a_row_that_cannot_be_judged_counts_as_wrong_and_is_logged(caplog):
    row = Row(id="q9", problem="How many?", answer="many", task="numeric")
    with caplog.at_level("WARNING"):
        assert group_records(row, group("<answer>3</answer>", row=row))[0]["correct"] is False
    assert "'q9'" in caplog.text
