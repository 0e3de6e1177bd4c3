"""Questions of MVBench, TempCompass, EgoSchema and Video-Holmes as they are released become rows."""

import json
from pathlib import Path

import pytest
from PIL import Image

from longrl.datamodules.loading.mixing import DataSource, records_of
from longrl.datamodules.media.frame_lists import read_frame_list
from longrl.datamodules.rows.question_rows import make_rows
from longrl.datamodules.rows.temporal_sets import (
    ego_schema_hidden_row,
    ego_schema_row,
    mvbench_row,
    temp_compass_rows,
    video_holmes_row,
)
from tests.datamodules.rows import released_questions as released
from tests.datamodules.rows.test_published import error_of, only, reward


def test_a_question_of_mvbench_is_about_a_part_of_some_tasks_videos():
    row = only([released.mvbench()], mvbench_row, "/m")
    asked = "Question: What happened after the person took the bag?\nOptions:\n(A) Ate the apple.\n(B) Closed the door."
    assert row.metadata["asked"] == f"{asked}\n(C) Sat down."
    assert (row.answer, row.category, row.metadata["span_s"]) == ("B", "Action Sequence", [1.0, 3.0])
    assert row.videos == ("/m/star/Charades_v1_480/ABC12.mp4",)
    whole = only([released.mvbench(task_type="Moving Count")], mvbench_row, "/m")
    assert whole.videos == ("/m/clevrer/video_validation/ABC12.mp4",)
    assert "span_s" not in whole.metadata
    assert "'task_type' must be one of Action Sequence" in error_of(released.mvbench(task_type="count"), mvbench_row)
    assert "'start' must lie before 'end'" in error_of(released.mvbench(end=1.0), mvbench_row)


def test_frames_of_tvqa_are_a_video_of_three_a_second(tmp_path):
    folder = tmp_path / "tvqa" / "frames_fps3_hq" / "castle_s01"
    folder.mkdir(parents=True)
    for number in range(1, 8):
        Image.new("RGB", (8, 8)).save(folder / f"{number:05d}.jpg")
    record = released.mvbench(task_type="Episodic Reasoning", video="castle_s01", start=1.0, end=2.0)
    row = only([record], mvbench_row, str(tmp_path))
    frames = read_frame_list(row.videos[0])
    assert [Path(path).name for path in frames.paths] == [f"{number:05d}.jpg" for number in range(1, 8)]
    assert frames.times[3] == 1.0
    assert row.metadata["span_s"] == [1.0, 2.0]


def test_a_source_says_what_its_file_name_says(tmp_path):
    record = released.mvbench()
    del record["task_type"]
    file = tmp_path / "action_sequence.json"
    file.write_text(json.dumps([record]))
    source = DataSource(str(file), fields={"task_type": "Action Sequence", "answer": "Sat down."})
    row = only(records_of(source), mvbench_row, "/m")
    assert (row.category, row.answer) == ("Action Sequence", "B")  # a record's own fields stay


def test_a_file_of_temp_compass_has_videos_by_name_and_questions_by_aspect(tmp_path):
    file = tmp_path / "multi-choice.json"
    file.write_text(json.dumps(released.temp_compass_file()))
    rows = make_rows(records_of(DataSource(str(file), fields={"task_type": "multi-choice"})), temp_compass_rows, "/m")
    assert [(row.id, row.answer, row.category) for row in rows] == [
        ("multi-choice-123456-0", "B", "action"), ("multi-choice-123456-1", "B", "action"),
        ("multi-choice-123456-2", "A", "speed"),
    ]  # fmt: skip
    assert {row.videos for row in rows} == {("/m/123456",)}
    assert rows[0].problem == "What is the boy doing?\nA. running\nB. jumping\nC. resting"
    assert rows[0].metadata == {
        "video_id": "123456", "task_type": "multi-choice", "instruction": "Please directly give the best option:"
    }  # fmt: skip


def test_other_kinds_of_temp_compass_are_judged_in_their_own_ways():
    yes_no = only([released.temp_compass("yes_no")], temp_compass_rows, "/m")
    assert (yes_no.task, yes_no.answer, reward(yes_no, "Yes."), reward(yes_no, "no")) == ("exact", "yes", 1, 0)
    caption = only([released.temp_compass("caption_matching")], temp_compass_rows, "/m")
    said = ["Caption B: A boy jumps.", "Caption B", "B", "B.", "A boy jumps.", "A", "Caption A", "A boy rests."]
    assert [reward(caption, text) for text in said] == [1, 1, 1, 1, 1, 0, 0, 0]
    told = only([released.temp_compass("captioning")], temp_compass_rows, "/m")
    assert (told.task, told.answer) == ("open_ended", "What is he doing?\nA. jumping\nB. resting\nA. jumping")
    assert told.metadata.keys() == {"video_id", "task_type"}
    assert "'task_type' must be one of multi-choice" in error_of(
        released.temp_compass("yes_no") | {"task_type": "yes"}, temp_compass_rows
    )


def test_ego_schema_with_its_answers_and_without():
    row = only([released.ego_schema()], ego_schema_row, "/m")
    assert (row.id, row.answer, row.videos) == ("0074f737", "D", ("/m/0074f737",))
    assert row.problem.splitlines()[1] == "A. C cleans the pot."
    from_file = only([released.ego_schema_file(answer=3)], ego_schema_row, "/m")
    assert (from_file.problem, from_file.answer) == (row.problem, "D")
    assert "needs 'answer', which is missing" in error_of(released.ego_schema_file(), ego_schema_row)
    hidden = only([released.ego_schema_file()], ego_schema_hidden_row, "/m")
    assert (hidden.problem, hidden.task, hidden.metadata["hidden_answer"]) == (row.problem, "open_ended", True)
    assert "needs 'q_uid'" in error_of({"question": "?"}, ego_schema_hidden_row)


def test_video_holmes_asks_in_one_line_and_has_options_by_letter():
    row = only([released.video_holmes()], video_holmes_row, "/m")
    assert row.metadata["asked"] == (
        "The question is: Who are the two?. The options are: A: Cleaners, B: Cousins, C: Rivals, D: Strangers, "
        "E: Officers, F: Actors"
    )
    assert (row.id, row.answer, row.category, row.reasoning) == ("RSm-1", "C", "SR", "They race each other.")
    assert row.problem.splitlines()[-1] == "F. Actors"
    assert "needs 'Options'" in error_of(released.video_holmes(Options=None), video_holmes_row)


@pytest.mark.parametrize("function", [mvbench_row, temp_compass_rows, ego_schema_row, video_holmes_row])
def test_a_record_of_another_set_names_what_it_lacks(function):
    assert "record 0" in error_of({"problem": "Why?", "answer": "A"}, function)
