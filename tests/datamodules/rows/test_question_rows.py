import io
import json

import pytest
from PIL import Image

from longrl.datamodules.rows.question_rows import (
    audio_qa_row,
    image_row,
    infer_task,
    longvideo_reason_row,
    make_rows,
    open_ended_row,
    plain_answer,
    plain_reasoning,
    question_row,
    text_math_row,
)
from longrl.datamodules.rows.sources import media_root_of, read_records
from longrl.rewards.reward_sum import check_answer
from longrl.testing.synthetic_videos import SyntheticConfig, make_records

QUESTION = "What comes next?\nA. a cat\nB. a dog\nC. a car"
NUMBERED = "What comes next?\n1. cat\n2. dog\n3. car"


def record(**changes):
    published = {
        "problem_id": 7,
        "problem": QUESTION,
        "data_type": "video",
        "problem_type": "Temporal Reasoning",
        "reasoning": "First a cat, then a dog.",
        "videos": "clips/7.mp4",
        "answer": "<answer>B</answer>",
    }
    return {name: value for name, value in {**published, **changes}.items() if value is not ...}


# ---- sources ----


RECORDS = [
    {"problem": "1 + 1?", "answer": "2", "videos": None},
    {"problem": "Who?", "answer": "Zoë", "videos": ["a.mp4"]},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_file_of_any_kind_gives_the_same_records(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    else:
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in RECORDS), encoding="utf-8"
        )
    assert list(read_records(path)) == RECORDS
    assert media_root_of(path) == str(tmp_path)


def test_a_hub_id_is_read_with_its_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_records("LongVideo-Reason/longvideo-reason:validation[:2]")) == RECORDS
    assert list(read_records("openai/gsm8k")) == RECORDS
    assert list(read_records("lmms-lab/NExTQA/MC:test")) == RECORDS
    assert asked == [
        ("LongVideo-Reason/longvideo-reason", None, "validation[:2]"),
        ("openai/gsm8k", None, "train"),
        ("lmms-lab/NExTQA", "MC", "test"),
    ]
    assert media_root_of("openai/gsm8k") is None


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("cut.jsonl", '{"problem": "a"}\n{"problem": ', r"line 2 of .*cut\.jsonl is no JSON"),
        ("list.jsonl", "[1]\n", r"line 1 of .* must hold a record, got list"),
        ("record.json", "{}", "must hold a list of records, or records by name, got dict"),
        ("lines.json", "{}\n{}\n", r"name a file of one record per line \.jsonl"),
        ("empty.jsonl", "\n", "holds no record"),
        ("rows.md", "a,b\n", "hub id owner/name:split, got"),
        ("names.json", '{"a": 1}', "must hold a list of records, or records by name, got dict"),
        ("rows.parquet", "PAR1 and then nothing", "is no parquet file: .*is it cut off"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path, source, content, message):
    path = tmp_path / source
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_hub_id_that_cannot_be_loaded_names_itself_and_the_remedy():
    with pytest.raises(ValueError, match=r"^data source nobody/nothing:train: it is not in the cache.*local \.json"):
        read_records("nobody/nothing")  # tests run offline


# ---- the published schema ----


def test_a_published_record_becomes_a_row():
    row = longvideo_reason_row(record(), 0, "/media")
    assert (row.id, row.problem, row.answer, row.task) == ("7", QUESTION, "B", "multiple_choice")
    assert (row.category, row.videos, row.images) == ("Temporal Reasoning", ("/media/clips/7.mp4",), ())
    assert row.reasoning == "First a cat, then a dog."


def test_several_videos_and_images_and_absolute_paths():
    row = longvideo_reason_row(record(videos=["a.mp4", "/b.mp4"], images="c.png"), 0, "/media")
    assert row.videos == ("/media/a.mp4", "/b.mp4")
    assert row.images == ("/media/c.png",)


def test_optional_fields_may_be_absent_or_null():
    row = longvideo_reason_row({"problem": "1 + 1?", "answer": 2, "reasoning": None, "videos": None}, 3)
    assert (row.id, row.answer, row.task, row.category, row.videos) == ("3", "2", "math", "general", ())
    assert row.reasoning is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem": ...},
            r"record 5 \(id '7'\) needs 'problem', which is missing; the record has problem_id, data_type",
        ),
        ({"answer": None}, r"needs 'answer', which is empty"),
        ({"answer": "  "}, r"needs 'answer', which is empty"),
        ({"videos": ...}, r"needs 'videos', which is missing, though its data_type is 'video'"),
        ({"videos": []}, r"needs 'videos', which is empty"),
        ({"data_type": "image", "videos": None}, r"needs 'images', which is missing"),
        ({"videos": [b"bytes"]}, r"'videos' holds the content of a video; set data.media_root"),
        ({"videos": [7]}, r"'videos' must hold file paths or media, got int '7'"),
        ({"metadata": [1]}, r"'metadata' must be fields by name, got list"),
    ],
)
def test_a_record_that_lacks_a_field_says_which_and_what_it_has(changes, message):
    with pytest.raises(ValueError, match=message):
        longvideo_reason_row(record(**changes), 5)


@pytest.mark.parametrize(
    ("problem", "answer", "has_media", "task"),
    [
        (QUESTION, "B", True, "multiple_choice"),
        ("Which one?", "B", True, "multiple_choice"),
        ("How many?", "12", True, "numeric"),
        ("How long?", "3.5 s", True, "numeric"),
        ("1 + 1?", "2", False, "math"),
        ("Describe the video.", "Two red circles.", True, "open_ended"),
        ("Solve.", "x", False, "open_ended"),
        (QUESTION, "E", False, "multiple_choice"),
        (QUESTION, "a dog", False, "multiple_choice"),
        (QUESTION, "a horse", True, "multiple_choice"),  # to be refused
        (QUESTION, "a dog B. a cat A. a car C.", False, "open_ended"),
        (NUMBERED, "2", True, "multiple_choice"),
        (NUMBERED, "dog", True, "multiple_choice"),
        (NUMBERED, "7", True, "numeric"),  # the list is what is asked about
        (NUMBERED, "2", False, "math"),
    ],
)
def test_the_task_follows_from_problem_and_answer(problem, answer, has_media, task):
    assert infer_task(problem, answer, has_media=has_media) == task


@pytest.mark.parametrize("answer", ["2", "(2)", "2. dog", "dog", "<answer>2</answer>"])
def test_a_numbered_option_may_be_spelled_out(answer):
    assert longvideo_reason_row(record(problem=NUMBERED, answer=answer), 0).answer == "2"


def test_options_behind_z_have_two_letters():
    fields = {"options": [f"thing {number}" for number in range(30)], "answer": 27, "videos": ("a.mp4",)}
    row = question_row({"id": "1"}, 0, "Which?", fields)
    assert row.problem.splitlines()[26:29] == ["Z. thing 25", "AA. thing 26", "AB. thing 27"]
    assert (row.answer, row.task) == ("AB", "multiple_choice")
    check_answer(row)
    same = question_row({"id": "1"}, 0, row.problem, {"answer": "thing 27", "videos": ("a.mp4",)})
    assert same.answer == "AB"


def test_a_record_may_name_its_task():
    assert longvideo_reason_row(record(task="exact"), 0).task == "exact"


@pytest.mark.parametrize(
    "answer", ["B", "<answer> b </answer>", "(B)", "B.", "B. a dog", "a dog", "<answer>a dog</answer>"]
)
def test_an_option_may_be_spelled_out(answer):
    assert longvideo_reason_row(record(answer=answer), 0).answer == "B"


@pytest.mark.parametrize("answer", ["D", "a horse"])
def test_an_answer_outside_the_options_is_refused(answer):
    (error,) = make_rows([record(answer=answer)], longvideo_reason_row, None)
    assert isinstance(error, ValueError)
    assert f"must be one of the options A, B, C, got '{answer}'" in str(error)


def of_media(problem, videos=(), images=()):
    return make_rows([record(problem=problem, videos=list(videos), images=list(images))], longvideo_reason_row, None)


@pytest.mark.parametrize(
    ("tags", "videos", "images"),
    [("<video><video>", ["a"], []), ("<image>", ["a"], []), ("<video>", ["a"], ["b"]), ("<image>", ["a"], ["b", "c"])],
)
def test_tags_that_place_other_media_than_the_row_has_are_refused(tags, videos, images):
    (error,) = of_media(f"{tags}{QUESTION}", videos, images)
    assert isinstance(error, ValueError)
    wanted = f"row '7' has {len(images)} images and {len(videos)} videos, but its problem places {tags[:7]}"
    assert wanted in str(error)
    assert "name every medium once, or none" in str(error)


def test_tags_for_every_medium_in_any_order_or_none_are_rows():
    for problem in (QUESTION, f"<video><image>{QUESTION}<video>"):
        (row,) = of_media(problem, ["a", "b"], ["c"])
        assert row.problem == problem


def test_tags_around_answer_and_reasoning_are_removed():
    assert plain_answer("so <answer>A</answer>, no, <answer> C </answer>") == "C"
    assert plain_reasoning("<think> I see. </think><answer>C</answer>") == "I see."
    assert plain_reasoning("I see. <answer>C</answer>") == "I see."
    assert plain_reasoning("") is None


def test_every_synthetic_record_is_a_valid_row():
    records, _ = make_records(SyntheticConfig(num_train_videos=4, num_eval_videos=2, num_pretrain_videos=3))
    rows = {split: make_rows(found, longvideo_reason_row, "x") for split, found in records.items()}
    assert {row.task for row in rows["train"] + rows["eval"]} == {"multiple_choice"}
    tasks = {row.category: row.task for row in rows["pretrain"]}
    assert set(tasks) == {"description", "lookup", "reading"}
    assert tasks["description"] == "open_ended"
    assert all(row.reasoning is None for row in rows["pretrain"])


# ---- other schemas ----


def test_text_mathematics_with_an_answer_field():
    row = text_math_row({"problem": "Solve x - 1 = 0.", "answer": "x"}, 2)
    assert (row.id, row.answer, row.task, row.videos, row.reasoning) == ("2", "x", "math", (), None)


def test_gsm8k_is_taken_apart():
    row = text_math_row({"question": "5 + 7?", "answer": "5 + 7 is 12.\n#### 12"}, 0)
    assert (row.problem, row.answer, row.reasoning) == ("5 + 7?", "12", "5 + 7 is 12.")


def test_mathematics_without_a_question_is_refused():
    with pytest.raises(ValueError, match="needs 'question', which is missing; the record has answer"):
        text_math_row({"answer": "1"}, 0)


def test_image_rows_name_files():
    row = image_row({"problem": "<image>How many?", "answer": "3", "images": ["a.png"]}, 0, "/media")
    assert (row.images, row.videos, row.task, row.category) == (("/media/a.png",), (), "numeric", "image")
    with pytest.raises(ValueError, match="needs 'images', which is empty"):
        image_row({"problem": "How many?", "answer": "3"}, 0)


def test_images_inside_records_are_written_once(tmp_path):
    picture = Image.new("RGB", (4, 6), "red")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    embedded = {"problem": "How many?", "answer": "3", "images": [{"bytes": buffer.getvalue(), "path": None}]}
    decoded = {"problem": "How many?", "answer": "3", "image": picture}
    rows = [image_row(item, 0, str(tmp_path)) for item in (embedded, decoded, embedded)]
    assert len({row.images for row in rows}) == 1
    assert Image.open(rows[0].images[0]).size == (4, 6)
    assert len(list((tmp_path / ".images").iterdir())) == 1
    with pytest.raises(ValueError, match=r"set data\.media_root"):
        image_row(decoded, 0)


# ---- questions about sound ----


def heard(**changes):
    asked = {"id": "q7", "audio": "a.wav", "question": "Which sound?"}
    asked |= {"options": ["a dog", "a bell"], "answer": "a bell"}
    return audio_qa_row({name: value for name, value in {**asked, **changes}.items() if value is not ...}, 3, "root")


@pytest.mark.parametrize("answer", ["a bell", "B", "(b)", 1, "B. a bell"])
def test_an_answer_about_sound_is_a_letter_a_wording_or_a_place(answer):
    row = heard(answer=answer)
    assert (row.id, row.answer, row.task) == ("q7", "B", "multiple_choice")
    assert row.problem == "Which sound?\nA. a dog\nB. a bell"
    assert (row.audios, row.videos, row.category) == (("root/a.wav",), (), "audio")
    check_answer(row)


def test_a_question_about_a_video_and_its_sound():
    row = heard(audio=..., video="v.mp4", options=..., choices=["A. dog", "B. bell"], answer="bell", category="sound")
    assert (row.videos, row.audios, row.answer, row.category) == (("root/v.mp4",), (), "B", "sound")
    assert row.problem == "Which sound?\nA. dog\nB. bell"


def test_a_question_about_sound_names_a_file():
    with pytest.raises(ValueError, match="needs 'audio', which is missing, and so are 'video' and 'image'"):
        heard(audio=...)


def test_tags_of_sounds_are_counted():
    record = {"problem": "<audio><audio>?", "answer": "very noisy", "audios": "a.wav"}
    (error,) = make_rows([record], longvideo_reason_row, None)
    assert "0 images and 0 videos and 1 audios, but its problem places <audio>, <audio>" in str(error)


def test_an_open_ended_row_is_one_whatever_its_answer_looks_like():
    record = {
        "problem_id": "lv-7", "problem": "What is written on the door?", "data_type": "video",
        "problem_type": "plot and narrative", "reasoning": "<think>A sign.</think>",
        "videos": ["longvila_videos/7.mp4"],
    }  # fmt: skip
    for answer in ("<answer>The number 3</answer>", "<answer>3</answer>", "<answer>A</answer>"):
        row = open_ended_row(record | {"answer": answer}, 0, "data")
        assert row.task == "open_ended"
        assert row.answer == answer.removeprefix("<answer>").removesuffix("</answer>")
    assert (row.id, row.category, row.reasoning) == ("lv-7", "plot and narrative", "A sign.")
    assert row.videos == ("data/longvila_videos/7.mp4",)
    with pytest.raises(ValueError, match="needs 'answer'"):
        open_ended_row(record, 0, "data")
