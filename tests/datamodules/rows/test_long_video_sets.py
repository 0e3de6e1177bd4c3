"""Questions of LVBench, MLVU, LongVideoBench and Video-MME-v2 as they are released become rows."""

from pathlib import Path

import pytest

from longrl.datamodules.rows.long_video_sets import (
    longvideobench_hidden_row,
    longvideobench_row,
    lvbench_rows,
    mlvu_hidden_row,
    mlvu_row,
    video_mme_v2_row,
)
from longrl.datamodules.rows.question_rows import make_rows
from longrl.types import Row
from tests.datamodules.rows import released_questions as released
from tests.datamodules.rows.test_published import error_of, only, touch


def test_a_video_of_lvbench_gives_a_row_of_every_question(tmp_path):
    root = touch(tmp_path, "videos/abcDEF12345.mp4")
    first, second, error = make_rows([released.lvbench()], lvbench_rows, root)
    assert first.problem == "What does the baker sell?\n(A) Bread\n(B) Shoes\n(C) Maps\n(D) Rope"
    assert (first.id, first.answer, first.task, first.category) == ("7", "C", "multiple_choice", "cartoon")
    assert first.videos == (str(tmp_path / "videos" / "abcDEF12345.mp4"),) == second.videos
    assert first.metadata["question_type"] == ["entity recognition", "reasoning"]
    assert first.metadata["video_id"] == "abcDEF12345"
    assert "needs 'answer', which is empty" in str(error)


def test_a_document_of_lvbench_on_the_hub():
    record = released.lvbench()["qa"][0] | {"video_path": "x.mp4", "question": "What?", "options": ["a", "b", "c"]}
    row = only([record], lvbench_rows, "/m")
    assert (row.problem, row.answer, row.videos) == ("What?\n(A) a\n(B) b\n(C) c", "C", ("/m/x.mp4",))
    assert "needs 'key'" in error_of({"qa": []}, lvbench_rows)


def test_a_choice_of_mlvu_is_about_the_video_in_its_tasks_folder(tmp_path):
    root = touch(tmp_path, "1_plotQA/movie_1.mp4", "7_topic_reasoning/movie_1.mp4", "9_summary/movie_1.mp4")
    row = only([released.mlvu()], mlvu_row, root)
    assert row.problem == "What is on the table?\nA. A vase\nB. A hat\nC. A fish\nD. A key"
    asked = "Question: What is on the table?\nOptions:\n(A) A vase\n(B) A hat\n(C) A fish\n(D) A key"
    assert row.metadata == {"video_id": "movie_1", "duration": 412.5, "asked": asked}
    assert (row.answer, row.category, row.task) == ("B", "plotQA", "multiple_choice")
    assert row.videos == (str(tmp_path / "1_plotQA" / "movie_1.mp4"),)
    test = released.mlvu(question_id="TR_0", question_type="topic_reasoning", answer="D")
    row = only([test], mlvu_row, root)
    assert (row.id, row.answer, Path(row.videos[0]).parent.name) == ("TR_0", "D", "7_topic_reasoning")
    assert "must be one of the options A, B, C, D, got 'A hen'" in error_of(released.mlvu(answer="A hen"), mlvu_row)


def test_scenes_and_summaries_of_mlvu_are_for_a_judge():
    scene = only([released.mlvu_scene()], mlvu_row, "/m")
    assert (scene.task, scene.answer) == ("free_form", "- A man ties a boat\n- He whistles")
    assert (scene.problem, scene.category) == ("Describe the scene at the harbour.", "subPlot")
    summary = released.mlvu_scene() | {"question_type": "summary", "scoring_points": None}
    assert only([summary], mlvu_row, "/m").answer == "A man ties a boat and whistles."


@pytest.mark.parametrize(
    ("row_function", "record"),
    [
        (mlvu_hidden_row, {"question_id": "AR_0", **released.mlvu(answer=None)}),
        (longvideobench_hidden_row, released.longvideobench(correct_choice=None)),
    ],
)
def test_hidden_questions_are_asked_and_nobody_here_can_score_them(row_function, record):
    row = only([record], row_function, "/m")
    assert (row.task, row.answer, row.metadata["hidden_answer"]) == ("open_ended", "hidden", True)
    assert row.problem.endswith("\nD. A key") or row.problem.endswith("\nD. A dog")


def test_a_question_of_longvideobench_in_its_file_and_in_the_hubs_table():
    row = only([released.longvideobench()], longvideobench_row, "/m")
    problem = "When she waves, what is behind her?\nA. A tree\nB. A car\nC. A wall\nD. A dog"
    assert (row.problem, row.answer, row.category, row.id) == (problem, "C", "T2O", "abc_0")
    assert row.videos == ("/m/videos/abc.mp4",)
    assert row.metadata == {
        "video_id": "abc", "duration": 4.0, "duration_group": 15, "topic_category": "KH-Knowledge-History",
        "subtitles": "/m/subtitles/abc_en.json", "subtitles_from_s": 0.0,
    }  # fmt: skip
    columns = {"option0": "A tree", "option1": "A car", "option2": "A wall", "option3": "N/A", "option4": "N/A"}
    table = {**released.longvideobench(), "candidates": None, **columns}
    assert only([table], longvideobench_row, "/m").problem.endswith("\nC. A wall")
    assert "longvideobench_hidden_row reads hidden splits" in error_of(
        {**table, "correct_choice": -1}, longvideobench_row
    )


def test_four_questions_of_video_mme_v2_are_a_group():
    rows = make_rows([released.video_mme_v2(number) for number in (1, 2, 3, 4)], video_mme_v2_row, "/m")
    assert all(isinstance(row, Row) for row in rows)
    assert rows[0].problem.splitlines()[:3] == ["What happens in step 1?", "A. Event A.", "B. Event B."]
    assert (rows[3].id, rows[3].answer, rows[3].category) == ("001-4", "E", "logic")
    assert rows[3].videos == ("/m/video/001.mp4",)
    assert rows[3].metadata == {
        "video_id": "001", "group": "001", "group_type": "logic", "group_structure": "[1, [2, 3], 4]", "level": "2",
        "second_head": "Order", "third_head": "Event order", "subtitles": "/m/subtitle/001.jsonl",
    }  # fmt: skip
    assert "level" not in rows[0].metadata
    assert only([released.video_mme_v2(4, level=2.0)], video_mme_v2_row, "/m").metadata["level"] == 2
