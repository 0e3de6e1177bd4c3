import base64
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from longrl.datamodules.media.frame_lists import read_frame_list
from longrl.datamodules.rows.published import canonical_row, video_r1_row
from longrl.datamodules.rows.question_rows import image_row, longvideo_reason_row, make_rows
from longrl.datamodules.rows.record_media import RecordMedia
from longrl.datamodules.rows.sources import read_records
from tests.datamodules.media.test_video import write
from tests.sounds import tone, write_sound

QUESTION = {"problem": "What comes next?\nA. a cat\nB. a dog", "answer": "B"}


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("clip") / "v.mp4", 8).read_bytes()


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def videos(value, folder, **record):
    return RecordMedia("video", str(folder)).paths(value, record)


# ---- content ----


def test_the_content_of_a_video_is_written_once_in_every_form(tmp_path, mp4):
    text = base64.b64encode(mp4).decode()
    forms = [
        mp4, bytearray(mp4), text, f"data:;base64,{text}", {"bytes": mp4, "path": None}, {"bytes": mp4, "path": "a"},
    ]  # fmt: skip
    paths = videos(forms, tmp_path)
    assert len(set(paths)) == 1
    assert Path(paths[0]).parent == tmp_path / ".videos"
    assert Path(paths[0]).read_bytes() == mp4
    assert len(list((tmp_path / ".videos").iterdir())) == 1
    kept = videos([f"data:video/mp4;base64,{text}", {"bytes": mp4, "path": "clips/7.MP4"}], tmp_path)
    assert [Path(path).suffix for path in kept] == [".mp4", ".mp4"]


def test_images_and_sounds_come_in_these_forms_too(tmp_path):
    sound = write_sound(tmp_path / "a.wav", tone(1.0)).read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    images = RecordMedia("image", str(tmp_path)).paths([png(3), uri, Image.new("RGB", (4, 4))], {})
    assert images[0] == images[1] != images[2]
    for mode in ("CMYK", "L", "I;16", "P", "1", "LA"):
        (path,) = RecordMedia("image", str(tmp_path)).paths(Image.new(mode, (4, 4)), {})
        assert Image.open(path).size == (4, 4)
    (path,) = RecordMedia("audio", str(tmp_path)).paths({"bytes": sound, "path": "x.wav"}, {})
    assert Path(path).read_bytes() == sound
    quoted = RecordMedia("image", str(tmp_path)).paths("data:image/svg+xml,%3Csvg%2F%3E", {})
    assert Path(quoted[0]).read_bytes() == b"<svg/>"


@pytest.mark.parametrize("value", [None, "", [], ()])
def test_nothing_is_nothing(value):
    assert RecordMedia("video", None).paths(value or None, {}) == ()


@given(st.text(st.sampled_from("abcXYZ019/+. "), min_size=1, max_size=600))
def test_a_path_is_never_taken_for_content(text):
    (path,) = RecordMedia("image", "/media").paths(text, {})
    assert path == (text if text.startswith("/") else f"/media/{text}")


def test_a_long_text_of_blanks_takes_linear_time():
    start = time.process_time()
    (path,) = RecordMedia("image", "/media").paths(" " * 50_000 + "!", {})
    assert path.endswith("!")
    assert time.process_time() - start < 1.0  # 1 ms; 6 s if blanks are given back one by one


def test_urls_stay_as_they_are_and_file_urls_are_paths():
    urls = ["https://example.com/a.mp4?x=1", "s3://bucket/a b.mp4"]
    assert videos(urls, "/media") == tuple(urls)
    assert videos("file:///clips/a%20b.mp4", "/media") == ("/clips/a b.mp4",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "must hold file paths or media, got int '7'"),
        ([""], "must hold file paths or media, got str"),
        ({"bytes": None, "path": None}, "must hold file paths or media, got dict"),
        ("data:video/mp4;base64,&&&", "a data URI that is no base64"),
    ],
)
def test_what_is_no_medium_is_said(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        videos([value], tmp_path)


def test_content_needs_a_place_to_be_written_to(tmp_path, mp4):
    with pytest.raises(ValueError, match="holds the content of a video; set data.media_root to a folder"):
        RecordMedia("video", None).paths(mp4, {})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which cannot be written to .*; set data.media_root to a folder where it can"):
        videos(mp4, tmp_path / "file")


# ---- frames ----


def frame_files(folder, count=4):
    (folder / "frames").mkdir()
    for index in range(count):
        (folder / "frames" / f"{index}.png").write_bytes(png(index))
    return [f"frames/{index}.png" for index in range(count)]


def test_a_list_of_image_files_is_one_video_with_the_records_rate(tmp_path):
    names = frame_files(tmp_path)
    forms = [(names, {"fps": 2}), ([names], {"fps": [2]}), ([{"frames": names, "fps": 2}], {})]
    (path,) = {path for value, record in forms for path in videos(value, tmp_path, **record)}
    frames = read_frame_list(path)
    assert frames.times == (0.0, 0.5, 1.0, 1.5)
    assert frames.end_s == 2.0
    assert [Path(file).resolve() for file in frames.paths] == [(tmp_path / name).resolve() for name in names]


def test_a_list_of_images_with_their_content_is_one_video_too(tmp_path):
    frame_files(tmp_path)
    uri = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    for frame in (uri, {"path": "frames/1.png", "bytes": None}, {"bytes": png(1), "path": "1.png"}, {"image": uri},
                  Image.open(tmp_path / "frames" / "1.png")):  # fmt: skip
        (path,) = videos([frame, frame], tmp_path, fps=2)
        assert len(read_frame_list(path).paths) == 2


def test_an_item_may_stand_under_the_name_of_its_kind(tmp_path, mp4):
    assert videos([{"type": "video", "video": "file:///a.mp4"}], tmp_path) == ("/a.mp4",)
    assert videos([{"video": mp4}], tmp_path) == videos([mp4], tmp_path)


def test_times_may_be_uneven_and_each_video_has_its_own(tmp_path):
    names = frame_files(tmp_path)
    first, second = videos([names[:2], names[2:]], tmp_path, frame_times=[[0, 3.5], [1, 2]])
    assert read_frame_list(first).times == (0.0, 3.5)
    assert read_frame_list(second).times == (1.0, 2.0)
    assert videos(names, tmp_path, frame_times=[0, 1, 2, 30])
    assert videos([{"frames": names[:2], "times": [0, 1]}], tmp_path)


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path):
    frame_files(tmp_path, 12)
    (tmp_path / "frames" / "notes.txt").touch()
    (path,) = videos("frames", tmp_path, fps=3)
    assert [Path(file).stem for file in read_frame_list(path).paths] == [str(index) for index in range(12)]
    assert videos("frames", tmp_path) == (str(tmp_path / "frames"),)  # without a rate it is a name like others


def test_frames_may_be_content_or_lie_elsewhere(tmp_path):
    mixed = [{"bytes": png(1), "path": None}, "https://example.com/2.png"]
    (path,) = videos([mixed], tmp_path, fps=1)
    first, second = read_frame_list(path).paths
    assert Path(first).read_bytes() == png(1)
    assert second == "https://example.com/2.png"


def test_frames_below_the_working_folder_and_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = frame_files(tmp_path, 2)
    (path,) = videos([[*names, "https://example.com/2.png"]], ".", fps=1)
    *here, elsewhere = read_frame_list(path).paths
    assert all(Path(file).is_file() for file in here)
    assert elsewhere == "https://example.com/2.png"


def test_a_data_set_that_is_moved_keeps_its_lists(tmp_path):
    frame_files(tmp_path)
    (path,) = videos("frames", tmp_path, fps=3)
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert all(Path(file).is_file() for file in read_frame_list(moved / Path(path).relative_to(tmp_path)).paths)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "needs their rate, `fps`, or their times in seconds, `frame_times`"),
        ({"fps": 0}, "must be above 0 frames per second, got 0"),
        ({"fps": "nan"}, "must be above 0 frames per second, got 'nan'"),
        ({"fps": "fast"}, "could not convert string to float"),
        ({"frame_times": [0, 2, 1, 3]}, "the times of 4 frames must be as many increasing seconds"),
        ({"frame_times": [0, 1]}, "the times of 4 frames must be as many increasing seconds"),
    ],
)
def test_frames_without_times_are_a_records_error(tmp_path, record, message):
    fields = QUESTION | {"videos": frame_files(tmp_path)} | record
    (error,) = make_rows([fields], longvideo_reason_row, str(tmp_path))
    assert message in str(error)
    assert str(error).startswith("record 0 (id '0'): 'videos' ")


# ---- records ----


def test_every_row_function_reads_them(tmp_path, mp4):
    frame_files(tmp_path)
    rows = [
        longvideo_reason_row(QUESTION | {"videos": [{"bytes": mp4, "path": "a.mp4"}]}, 0, str(tmp_path)),
        canonical_row({"question": QUESTION["problem"], "answer": "B", "video": mp4}, 0, str(tmp_path)),
        canonical_row({"question": "Why?", "answer": "x", "video": "frames", "fps": 2}, 0, str(tmp_path)),
        video_r1_row({"problem": "Why?", "solution": "x", "path": mp4}, 0, str(tmp_path)),
    ]
    assert all(Path(row.videos[0]).is_file() for row in rows)
    assert rows[2].videos[0].endswith(".frames.json")
    image = image_row({"problem": "How many?", "answer": "3", "images": [png(1)]}, 0, str(tmp_path))
    assert Path(image.images[0]).parent == tmp_path / ".images"


def test_videos_in_a_parquet_file_are_read_batch_by_batch(tmp_path, mp4):
    import pyarrow
    from pyarrow import parquet

    records = [QUESTION | {"problem_id": str(n), "videos": [{"bytes": mp4, "path": None}]} for n in range(100)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    read = read_records(tmp_path / "rows.parquet")
    assert len(read) == 100
    rows = make_rows(read, longvideo_reason_row, str(tmp_path))
    assert [row.id for row in rows] == [str(n) for n in range(100)]
    assert len({row.videos for row in rows}) == 1
    assert read[3]["problem_id"] == "3"


def test_video_features_of_datasets_come_as_they_are_stored(tmp_path, mp4, monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "problem_type": datasets.Value("string"),
            "video": datasets.Video(),
            "others": datasets.List(datasets.Video()),
            "picture": datasets.Image(),
        }
    )
    content = {"bytes": mp4, "path": None}
    picture = {"bytes": png(2), "path": None}
    columns = {"question": ["Why?"], "answer": ["x"], "problem_type": ["exact"], "video": [content]}
    columns |= {"others": [[content]], "picture": [picture]}
    with monkeypatch.context() as patched:  # it would load torchcodec, which may be there without its FFmpeg
        patched.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
        stored = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stored)
    (record,) = read_records("owner/videos")
    assert record["video"]["bytes"] == record["others"][0]["bytes"] == mp4
    assert np.array(record["picture"]).max() == 2  # images are decoded, as they always were
    (row,) = make_rows([record], canonical_row, str(tmp_path))
    assert Path(row.videos[0]).read_bytes() == mp4


@given(
    st.dictionaries(
        st.sampled_from(["problem", "answer", "videos", "images", "fps", "metadata", "data_type", "frame_times"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_no_record_ends_a_run(record):
    (made,) = make_rows([record], longvideo_reason_row, None)
    assert isinstance(made, ValueError) or json.dumps(made.problem)
