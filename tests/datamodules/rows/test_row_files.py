import json

import pytest

from longrl import read_rows

QUESTION = {"question": "Which?", "options": ["one", "two"], "answer": 1, "video": "clips/a.mp4"}


def written(folder, *records):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_file_gives_rows_whose_media_lie_beside_it(tmp_path):
    rows = read_rows(written(tmp_path, QUESTION, QUESTION | {"answer": "A"}))
    assert [row.answer for row in rows] == ["B", "A"]
    (elsewhere,) = read_rows(written(tmp_path, QUESTION), media_root="/media")
    assert (rows[0].videos, elsewhere.videos) == ((str(tmp_path / "clips/a.mp4"),), ("/media/clips/a.mp4",))


def test_the_first_record_that_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="record 1 .*needs 'question', which is missing"):
        read_rows(written(tmp_path, QUESTION, {"answer": "A"}))


def test_a_row_function_is_named_or_given(tmp_path):
    file = written(tmp_path, {"problem_id": 7, "problem": "Which?\nA. one\nB. two", "answer": "A", "videos": "a.mp4"})
    (row,) = read_rows(file, "longrl.datamodules.rows.longvideo_reason_row")
    assert row.id == "7"
    with pytest.raises(ValueError, match="row_function is called as"):
        read_rows(file, lambda record: record)
