"""Sample records and their files."""

import json

import pytest
import torch

from longrl.evaluation.records import read_jsonl, sample_record, write_jsonl
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
    prompt = Prompt("q1", torch.zeros(9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long), (media,), row)
    return Group(prompt, [Completion(torch.zeros(5), torch.zeros(5), text, finish_reason) for text in texts])


def test_a_record_holds_what_was_asked_seen_said_and_scored():
    scored = group("<think>x</think><answer>dog</answer>", finish_reason="length")
    RewardSum([RewardTerm("longrl.rewards.accuracy", 2.0)]).score([scored])
    assert sample_record(scored, frames_per_cell=2) == {
        "id": "q1",
        "sample": 0,
        "task": "multiple_choice",
        "category": "spatial",
        "breakdowns": {},
        "video": "clips/7.mp4",
        "problem": ROW.problem,
        "answer": "B",
        "prediction": "<think>x</think><answer>dog</answer>",
        "prediction_answer": "dog",
        "letter": "B",
        "accuracy": 1.0,
        "correct": True,
        "correct_lenient": True,
        "format": True,
        "rewards": {"accuracy": 1.0},
        "reward": 2.0,
        "finish_reason": "length",
        "num_prompt_tokens": 9,
        "num_completion_tokens": 5,
        "num_frames": 4,
        "timestamps": [[0.5, 1.5]],
        "grid_thw": [[2, 2, 2]],
    }


def test_strict_and_lenient_differ_without_a_tag_and_unknown_frames_are_null():
    record = sample_record(group("<answer>A</answer>", "The answer is B"), index=1)
    assert (record["correct"], record["correct_lenient"], record["letter"]) == (False, True, None)
    assert record["sample"] == 1
    assert (record["num_frames"], record["reward"], record["rewards"]) == (None, None, {})


def test_temporal_answers_are_right_from_an_overlap_of_one_half():
    row = Row(id="q1", problem="When?", answer="0-10", task="temporal_iou")
    close, far = group("<answer>0 to 6 s</answer>", row=row), group("<answer>0 to 4 s</answer>", row=row)
    assert [sample_record(g)["correct"] for g in (close, far)] == [True, False]
    assert sample_record(far)["accuracy"] == pytest.approx(0.4)
    assert sample_record(far)["letter"] is None
    assert sample_record(far)["video"] == ""


def test_a_task_without_a_judge_takes_the_accuracy_of_the_rewards_or_stays_unjudged():
    row = Row(id="q1", problem="Why?", answer="Because.", task="open_ended")
    judged = group("x", row=row)
    assert sample_record(judged)["correct"] is None
    judged.reward_parts = {"accuracy": torch.tensor([1.0])}
    assert sample_record(judged)["correct"] is True


def test_a_row_that_cannot_be_judged_counts_as_wrong_and_is_logged(caplog):
    row = Row(id="q9", problem="How many?", answer="many", task="numeric")
    with caplog.at_level("WARNING"):
        assert sample_record(group("<answer>3</answer>", row=row))["correct"] is False
    assert "'q9'" in caplog.text


def test_records_are_written_and_read_back(tmp_path):
    records = [sample_record(group("<answer>B</answer>")), {"id": "\u00e9\n\u2028"}]
    path = write_jsonl(tmp_path / "new" / "samples.jsonl", records)
    assert read_jsonl(path) == records
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3
    json.loads(path.read_text(encoding="utf-8").split("\n")[0])


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = write_jsonl(tmp_path / "samples.jsonl", [{"id": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"id": 2}, {"id": object()}])
    assert read_jsonl(path) == [{"id": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
