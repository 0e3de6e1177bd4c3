"""Records as they are released become rows; what cannot is named and counted."""

import csv
import json
from pathlib import Path

import pytest

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows.lmms_eval import lmms_eval_row
from longrl.datamodules.rows.media_files import find_video
from longrl.datamodules.rows.published import (
    canonical_row,
    clevrer_rows,
    llava_video_rows,
    next_qa_row,
    perception_test_rows,
    star_row,
    video_mme_row,
    video_r1_row,
)
from longrl.datamodules.rows.question_rows import clevr_row, geometry_row, longvideo_reason_row, make_rows
from longrl.datamodules.rows.sources import read_records
from longrl.rewards.reward_sum import accuracy, check_answer
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Completion, Row, UnusableSample
from tests.datamodules.rows import published_records as published
from tests.tiny import vl_family


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return str(root)


def only(records, row_function, media_root) -> Row:
    (row,) = make_rows(records, row_function, media_root)
    assert isinstance(row, Row), row
    return row


def error_of(record, row_function) -> str:
    (error,) = make_rows([record], row_function, None)
    assert isinstance(error, ValueError)
    return str(error)


def reward(row: Row, answer: str) -> float:
    return accuracy(Completion((), (), f"<think>So.</think><answer>{answer}</answer>", "stop"), row)


# ---- where videos lie ----


def test_a_name_with_a_folder_is_that_file_and_no_other(tmp_path):
    root = touch(tmp_path, "val/0001.mp4", "train/0001.webm")
    assert find_video("train/0001.mp4", root) == str(tmp_path / "train" / "0001.mp4")  # listed as missing
    assert find_video("train/0001.webm", root) == str(tmp_path / "train" / "0001.webm")


@pytest.mark.parametrize("file", ["a.mp4", "a.MP4", "a.webm", "data/a.mkv", "video_0-100/a.mov"])
def test_an_id_is_the_one_video_of_that_name(tmp_path, file):
    root = touch(tmp_path, file, "a.srt", "subtitle/a.srt", "b.mp4")
    assert find_video("a", root) == str(tmp_path / file)


def test_an_id_of_two_files_or_none_is_left_to_be_missing(tmp_path):
    root = touch(tmp_path, "one/a.mp4", "two/a.mp4", "b.txt")
    assert [find_video(name, root) for name in ("a", "b")] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert find_video("a", str(tmp_path / "nowhere")) == str(tmp_path / "nowhere" / "a")
    assert find_video("/x/a.mp4", root) == "/x/a.mp4"


def test_a_bare_file_name_is_found_a_folder_below_and_a_new_file_is_seen(tmp_path):
    root = touch(tmp_path, "video_10000-11000/video_10008.mp4")
    assert not Path(find_video("video_10009.mp4", root)).is_file()
    touch(tmp_path, "video_10000-11000/video_10009.mp4")
    assert find_video("video_10009.mp4", root) == str(tmp_path / "video_10000-11000" / "video_10009.mp4")


def test_the_evaluation_archives_are_found_where_they_unpack(tmp_path):
    root = touch(tmp_path, "longvideo_eval_subset7/2.webm", "other/2.webm")
    assert find_video("longvila_videos/2.webm", root) == str(tmp_path / "longvideo_eval_subset7" / "2.webm")
    touch(tmp_path, "longvila_videos/2.webm")
    assert find_video("longvila_videos/2.webm", root) == str(tmp_path / "longvila_videos" / "2.webm")


# ---- LongVideo-Reason ----


def test_the_whole_records_are_rows_and_the_five_malformed_ones_say_why():
    rows = make_rows(published.longvideo_reason_test(), longvideo_reason_row, "/media")
    whole = [row for row in rows if isinstance(row, Row)]
    assert [row.answer for row in whole] == ["A", "B", "C", "A", "D"]
    assert [row.category for row in whole] == ["temporal", "spatial", "goal", "plot", "temporal"]
    assert [Path(row.videos[0]).suffix for row in whole[:3]] == [".mp4", ".webm", ".mkv"]
    errors = [str(row) for row in rows if isinstance(row, ValueError)]
    assert [error[:9] for error in errors] == [f"row '{n}'" for n in (147, 743, 825, 379, 857)]
    assert all("must list its options from A on, found none in" in error for error in errors)


def write(folder: Path, records: list[dict], name: str = "rows.json") -> str:
    path = folder / name
    path.write_text(json.dumps(records))
    return str(path)


def test_malformed_records_are_an_error_by_default_and_counted_when_skipped(tmp_path):
    source = write(tmp_path, published.longvideo_reason_test())
    touch(tmp_path, *(f"longvila_videos/{name}" for name in ("1.mp4", "2.webm", "3.mkv", "4.mp4")))
    with pytest.raises(ValueError, match=r"5 of 10 records of data\.test .* the first: row '147': .*bad_records=skip"):
        LongVideoReason(vl_family(), test=source).read(["test"])
    module = LongVideoReason(
        vl_family(), test=source, bad_records="skip", max_skipped_share=0.5, skipped_dir=str(tmp_path)
    )
    module.read(["test"])
    assert len(module.datasets["test"]) == 5
    assert len(module.skips("test")) == 5
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["reason"][:9] for line in lines] == [f"row '{n}'" for n in (147, 743, 825, 379, 857)]


def test_two_questions_on_one_video_are_two_rows(tmp_path):
    rows = make_rows(published.longvideo_reason_test()[:5:4], longvideo_reason_row, None)
    assert len({row.id for row in rows}) == 2
    assert rows[0].videos == rows[1].videos


# ---- VideoMME ----


def test_a_question_of_video_mme(tmp_path):
    root = touch(tmp_path, "data/fFjv93ACGo8.mkv")
    row = only([published.video_mme()], video_mme_row, root)
    assert row.problem == "How many candles burn on the table?\nA. Two.\nB. Three.\nC. Four.\nD. Five."
    assert (row.id, row.answer, row.task, row.category) == ("001-1", "C", "multiple_choice", "short")
    assert row.videos == (str(tmp_path / "data" / "fFjv93ACGo8.mkv"),)
    assert row.metadata == {
        "video_id": "fFjv93ACGo8", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
        "task_type": "Counting Problem",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videoID": None}, "needs 'videoID', which is empty"),
        ({"options": []}, "record 0 (id '001-1') needs 'options', which is empty"),
        ({"answer": ""}, "record 0 (id '001-1') needs 'answer', which is empty"),
        ({"answer": "E"}, "row '001-1': the answer must be one of the options A, B, C, D, got 'E'"),
        ({"question": None}, "needs 'question', which is empty"),
    ],
)
def test_a_malformed_question_of_video_mme_names_row_and_field(changes, message):
    assert message in error_of(published.video_mme(**changes), video_mme_row)


# ---- the training sets ----


def test_every_turn_of_a_llava_video_conversation_is_a_row():
    rows = make_rows([published.llava_video()], llava_video_rows, "/media")
    assert [row.problem for row in rows] == [
        "What colour is the kite?\nA. Red.\nB. Green.",
        "Who holds the kite?\nA. A girl.\nB. A boy.",
    ]
    assert [(row.id, row.answer, row.task) for row in rows] == [
        ("1234-5678-0", "B", "multiple_choice"), ("1234-5678-1", "A", "multiple_choice"),
    ]  # fmt: skip
    assert {row.videos for row in rows} == {("/media/liwei_youtube_videos/videos/youtube_video_2024/ytb_abc.mp4",)}
    assert rows[0].metadata == {"video_id": "ytb_abc", "duration": "0_30_s"}
    assert rows[0].category == "0_30_s_youtube_v0_1"


def test_a_caption_of_llava_video_is_open_and_a_bad_turn_leaves_the_others():
    turns = [
        {"from": "human", "value": "<image>\nPlease describe the video in detail."},
        {"from": "gpt", "value": "A kite rises over the beach."},
        {"from": "gpt", "value": "Indeed."},
        {"from": "gpt", "value": "Yes."},
    ]
    row, error = make_rows([published.llava_video(conversations=turns)], llava_video_rows, None)
    assert (row.problem, row.task) == ("Please describe the video in detail.", "open_ended")
    assert "record 0: turn 2 of 'conversations' must be of human, the next of gpt" in str(error)
    assert "needs 'conversations'" in error_of(published.llava_video(conversations=turns[:1]), llava_video_rows)


def test_a_question_of_next_qa_from_the_hub_and_from_its_table(tmp_path):
    path = tmp_path / "val.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, published.next_qa())
        table.writeheader()
        table.writerow(published.next_qa())
    for records in ([published.next_qa()], read_records(path)):
        row = only(records, next_qa_row, "/media")
        assert (row.id, row.answer, row.category) == ("4010069381-6", "D", "causal")
        assert row.problem.splitlines()[1:] == [
            "A. roll the handle", "B. tap their feet", "C. strum the string", "D. hit with sticks", "E. pat with hand",
        ]  # fmt: skip
        assert row.metadata == {"video_id": "4010069381", "task_type": "CH"}
    assert "must be the place of an option" in error_of(published.next_qa(answer="D"), next_qa_row)
    assert "must be one of the options A, B, C, D, E" in error_of(published.next_qa(answer=5), next_qa_row)


def test_an_open_question_of_next_qa():
    record = {"video": "1", "question": "why", "answer": "to see", "qid": 1, "type": "DO"}
    row = only([record], next_qa_row, None)
    assert (row.task, row.answer, row.category) == ("open_ended", "to see", "descriptive")


def test_the_perception_test_by_question_and_by_video(tmp_path):
    row = only([published.perception_test_question()], perception_test_rows, "/m")
    assert (row.id, row.answer, row.category) == ("video_1580-121", "A", "physics")
    assert row.metadata == {"video_id": "video_1580", "task_type": "descriptive", "tags": ["motion"]}
    source = tmp_path / "mc_question_valid.json"
    source.write_text(json.dumps({"video_1580": published.perception_test_video()}))
    first, second, error = make_rows(read_records(source), perception_test_rows, "/m")
    assert [(one.id, one.answer) for one in (first, second)] == [("video_1580-34", "A"), ("video_1580-35", "C")]
    assert first.videos == second.videos == ("/m/video_1580",)
    assert "record 0 (id '36') needs 'answer_id', which is empty" in str(error)


def test_a_scene_of_clevrer_gives_a_row_of_every_question():
    *rows, error = make_rows([published.clevrer()], clevrer_rows, "/m")
    assert [(row.task, row.answer) for row in rows] == [
        ("numeric", "3"), ("exact", "yes"), ("multiple_choice", "B"), ("exact", "1, 3"), ("exact", "none"),
    ]  # fmt: skip
    assert [row.category for row in rows] == [
        "descriptive", "descriptive", "predictive", "explanatory", "counterfactual",
    ]  # fmt: skip
    assert {row.videos for row in rows} == {("/m/video_10009.mp4",)}
    assert rows[0].metadata == {"video_id": "video_10009", "task_type": "count"}
    assert len({row.id for row in rows}) == 5
    assert "record 0 (id '5') needs 'answer', which is missing" in str(error)


def test_all_right_statements_of_clevrer_must_be_named():
    rows = make_rows([published.clevrer()], clevrer_rows, None)
    several, none = rows[3], rows[4]
    said = ["1, 3", "1,3", "1 and 3", "1", "1, 2, 3", "none", "3, 1"]
    assert [reward(several, text) for text in said] == [1, 1, 1, 0, 0, 0, 0]
    assert [reward(none, text) for text in ("none", "None.", "1")] == [1, 1, 0]


def test_a_question_of_star_is_about_its_situation():
    row = only([published.star()], star_row, "/m")
    assert (row.id, row.answer, row.category) == ("Interaction_T1_4", "B", "Interaction")
    assert row.metadata == {"video_id": "TJZ0P", "span_s": [1.0, 3.0]}
    assert "'start' must lie before 'end', got 3 and 1 s" in error_of(published.star(start=3, end=1), star_row)
    assert "got 'The spoon.'" in error_of(published.star(answer="The spoon."), star_row)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with a video of 8 to 10 s under the name that STAR's records have."""
    folder = tmp_path_factory.mktemp("star")
    generate_videos(folder, SyntheticConfig(1, 1, 1, scene_s=2.0, size=56))
    (folder / "videos" / "train_000000.mp4").rename(folder / "videos" / "TJZ0P.mp4")
    return folder


def test_only_the_situation_is_read_and_two_of_a_video_are_two_media(clip):
    records = [published.star(), published.star(start=4.0, end=6.5)]
    rows = make_rows(records, star_row, str(clip))
    renderer = RowRenderer(vl_family(), VideoSampling(fps=2.0, min_frames=1), cached_media=4)
    first, second, again = (renderer(row).media[0] for row in (*rows, rows[0]))
    assert all(1.0 <= time < 3.0 for time in first.timestamps)
    assert all(4.0 <= time < 6.5 for time in second.timestamps)
    assert first.key == again.key != second.key
    assert first.grid_thw[0] == 2  # 4 frames, two to a cell


def test_a_situation_behind_the_end_of_its_video_is_skipped(clip):
    (row,) = make_rows([published.star(start=90, end=95)], star_row, str(clip))
    with pytest.raises(UnusableSample, match=r"TJZ0P\.mp4: it ends after .* s, before the part from 90 s on"):
        RowRenderer(vl_family(), VideoSampling())(row)


def test_the_sound_of_a_part_is_never_that_of_the_whole(clip):
    family = vl_family()
    family.use_audio_in_video = True
    (row,) = make_rows([published.star()], star_row, str(clip))
    with pytest.raises(UnusableSample, match="a sound track is heard as a whole; set .*use_audio_in_video to false"):
        RowRenderer(family, VideoSampling())(row)


def test_star_without_choices_or_answer_is_refused():
    assert "needs 'options'" in error_of(published.star(choices=[]), star_row)
    hidden = {key: value for key, value in published.star().items() if key != "answer"}
    assert "needs 'answer', which is missing" in error_of(hidden, star_row)


# ---- images ----


def test_clevr_counts_and_names():
    row = only([published.clevr()], clevr_row, "/m")
    assert (row.images, row.answer, row.task, row.category) == (("/m/images/0.png",), "7", "numeric", "clevr")
    solved = published.clevr(answer=None, solution="<answer> rubber </answer>")
    assert only([solved], clevr_row, "/m").task == "exact"


def test_geometry_is_judged_as_mathematics():
    row = only([published.geometry()], geometry_row, "/m")
    assert (row.task, row.category, row.answer) == ("math", "geometry", "2 \\sqrt { 221 }")
    assert reward(row, "$\\sqrt{884}$") == 1.0
    assert reward(row, "29") == 0.0
    chosen = published.geometry(problem="<image>Find x.\nA. 3\nB. 4", answer="B")
    assert only([chosen], geometry_row, "/m").task == "multiple_choice"


def test_several_images_are_placed_by_their_tags():
    figures = published.geometry(images=["a.png", "b.png"], problem="<image> and <image>: which is larger?", answer="4")
    assert only([figures], geometry_row, "/m").images == ("/m/a.png", "/m/b.png")
    assert "has 2 images and 0 videos" in error_of({**figures, "problem": "<image> only?"}, geometry_row)


# ---- any benchmark ----


@pytest.mark.parametrize("answer", ["a plate", "B", "(b)", 1, "<answer>B</answer>", "B. a plate"])
def test_the_canonical_form_takes_answers_in_any_spelling(answer):
    row = only([published.canonical(answer=answer)], canonical_row, "/m")
    assert (row.id, row.problem, row.answer) == ("q1", "What falls?\nA. a cup\nB. a plate", "B")
    assert (row.videos, row.category, row.task) == (("/m/clips/a.webm",), "plot", "multiple_choice")
    assert row.metadata == {"video_id": "a", "domain": "home", "subtitles": "/m/clips/a.srt"}


def test_the_canonical_form_without_options():
    row = only([published.canonical(options=None, answer="12", problem_type="numerical")], canonical_row, None)
    assert (row.task, row.category) == ("numeric", "general")
    open_ended = published.canonical(options=None, answer="it slips", problem_type="open_ended", subtitles=None)
    assert only([open_ended], canonical_row, None).task == "open_ended"
    assert "got 'a spoon'" in error_of(published.canonical(answer="a spoon"), canonical_row)


@pytest.mark.parametrize(("field", "other"), [("options", "choices"), ("video", "video_path"), ("video", "videos")])
def test_what_another_set_calls_otherwise_is_named_and_not_left_out(field, other):
    record = published.canonical()
    renamed = {other if name == field else name: value for name, value in record.items()}
    assert f"needs {field!r}, which is missing, but it has {other!r}: rename that" in error_of(renamed, canonical_row)
    assert only([{**record, other: record[field]}], canonical_row, "/m").problem  # both: ours is read
    assert "got 'option number 2'" in error_of(published.canonical(answer=2), canonical_row)


DOCUMENTS = {
    "VideoMME": (published.video_mme(), "C", "fFjv93ACGo8"),
    "NExT-QA": (published.next_qa(), "D", "4010069381"),
    "PerceptionTest": (published.perception_test_question(answer_id=1), "B", "video_1580"),
    "a mapping": ({"question": "?", "options": {"A": "x", "B": "y"}, "answer": "y", "video_path": "v/z.mkv"}, "B", "z"),
    "columns": ({"question": "?", "A": "x", "B": "y", "C": None, "answer": "A", "video": "z.mp4"}, "A", "z"),
    "null fields": (
        {
            "video_name": "z.mp4",
            "duration": None,
            "question": "?",
            "candidates": ["x", "y"],
            "answer": "y",
            "question_type": None,
            "question_id": None,
            "options": None,
            "category": None,
        },
        "B",
        "z",
    ),
    "a sample": ({"doc_id": 3, "doc": published.video_mme(), "target": "C", "resps": [["C"]]}, "C", "fFjv93ACGo8"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_lmms_eval_tasks(name):
    record, answer, video_id = DOCUMENTS[name]
    row = only([record], lmms_eval_row, "/m")
    assert (row.answer, row.task, str(row.metadata["video_id"])) == (answer, "multiple_choice", video_id)
    assert Path(row.videos[0]).stem == video_id


def test_a_document_without_a_video_is_refused():
    message = error_of({"question": "?", "options": ["x", "y"], "answer": 0}, lmms_eval_row)
    assert "needs 'video', which is missing, and so are 'video_path'" in message


MLVU = {
    "video_name": "surveil_8.mp4", "duration": None, "question": "What is missing?", "candidates": ["Cat", "Dog", None],
    "answer": "Dog", "task_type": None, "question_id": None,
}  # fmt: skip
LONG_VIDEO_BENCH = {
    "video_id": "86CxyhFV9MI", "id": "86CxyhFV9MI_0", "video_path": "86CxyhFV9MI.mp4", "subtitle_path": None,
    "correct_choice": 1, "question": "Where is it?", "option0": "here", "option1": "there", "option2": "nowhere",
    "option3": "N/A", "option4": "N/A", "duration": 189.16, "duration_group": 600, "question_category": "S2E",
    "topic_category": "KS", "starting_timestamp_for_subtitles": None,
}  # fmt: skip


def test_fields_of_mlvu_may_be_null():
    row = only([MLVU], lmms_eval_row, "/m")
    assert (row.problem, row.answer) == ("What is missing?\nA. Cat\nB. Dog", "B")
    assert (row.category, row.id, row.metadata) == ("general", "0", {"video_id": "surveil_8"})
    inline = {**MLVU, "question": "What?\n(A) Cat\n(B) Dog", "candidates": None, "answer": "A", "task_type": "needle"}
    row = only([inline], lmms_eval_row, "/m")
    assert (row.answer, row.task, row.category) == ("A", "multiple_choice", "needle")
    released = {"video": "1.mp4", "question": None, "problem": "What?", "candidates": ["Cat", "Dog"], "answer": "Cat",
                "question_type": "plotQA", "duration": float("nan")}  # fmt: skip
    row = only([released], lmms_eval_row, "/m")
    assert (row.problem, row.answer, row.category) == ("What?\nA. Cat\nB. Dog", "A", "plotQA")
    assert row.metadata == {"video_id": "1"}
    assert "needs 'answer', which is empty" in error_of({**MLVU, "answer": None}, lmms_eval_row)
    assert "needs 'question'" in error_of({**MLVU, "question": None}, lmms_eval_row)


def test_options_that_longvideobench_has_not_are_none():
    row = only([LONG_VIDEO_BENCH], lmms_eval_row, "/m")
    assert (row.problem, row.answer) == ("Where is it?\nA. here\nB. there\nC. nowhere", "B")
    assert (row.category, row.metadata) == ("S2E", {"video_id": "86CxyhFV9MI", "duration": 189.16})
    table = {**LONG_VIDEO_BENCH, "correct_choice": 2.0, "option3": float("nan"), "option4": None, "candidates": []}
    assert only([table], lmms_eval_row, "/m").answer == "C"
    gap = {**LONG_VIDEO_BENCH, "option1": None}
    assert "an option before the last is null" in error_of(gap, lmms_eval_row)


def test_own_records_may_have_nulls_behind_their_options():
    record = {"id": "x", "video": "v.mp4", "question": "?", "options": ["a", "b", None, None], "answer": 1}
    assert only([record], canonical_row, "/m").problem == "?\nA. a\nB. b"
    assert "an option before the last is null" in error_of({**record, "options": ["a", None, "b"]}, canonical_row)


def test_a_video_r1_record_becomes_a_row():
    found = {
        "problem_id": 1,
        "problem": "What moves?",
        "options": ["A. cat", "B. dog"],
        "data_type": "video",
        "problem_type": "multiple choice",
        "process": "<think>The cat sleeps.</think>",
        "solution": "<answer>B</answer>",
        "path": "./v/1.mp4",
    }
    row = video_r1_row(found, 0, "/media")
    check_answer(row)
    assert (row.problem, row.answer, row.task) == ("What moves?\nA. cat\nB. dog", "B", "multiple_choice")
    assert (row.videos, row.reasoning) == (("/media/./v/1.mp4",), "The cat sleeps.")
    image = video_r1_row({**found, "data_type": "image", "problem_type": "regression", "options": []}, 0)
    assert (image.images, image.videos, image.task) == (("./v/1.mp4",), (), "regression")
