"""Subtitles: read as released, chosen by time, cut by a rule, shown where the template says."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.shown_media import without_media
from longrl.datamodules.loading.templates import DEFAULT_QUESTION
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Line, Subtitles, read_subtitles, subtitle_text, take_fitting
from longrl.datamodules.rows.published import canonical_row, video_mme_row
from longrl.datamodules.rows.question_rows import make_rows
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Row, UnusableSample
from tests.datamodules.rows import published_records as published
from tests.tiny import vl_family

# As VideoMME's: every line in a font tag; the third has no text, the fourth no blank line behind it.
SRT = """1
00:00:00,160 --> 00:00:02,319
<font color="white" size=".72c">we light
the first candle</font>

2
00:00:03,000 --> 00:00:04,000
<i>42</i>

3
00:00:04,500 --> 00:00:05,000

4
00:00:05,000 --> 00:00:06,500
it burns &amp; burns
5
01:00:00,000 --> 01:00:01,000
an hour later
"""
# As downloaded captions: a header, notes, names of cues, places and the times of words.
VTT = """WEBVTT
Kind: captions
Language: en

NOTE by hand

intro
00:00.160 --> 00:02.319 align:start position:0%
<v Ann>we light<00:00:01.000><c> the first candle</c>

NOTE in between

second-cue
00:00:03.000 --> 00:00:04.000
42
"""
LINES = [Line(0.16, 2.319, "we light the first candle"), Line(3.0, 4.0, "42")]


def write(folder: Path, name: str, text: str | list) -> str:
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return str(folder / name)


# ---- reading ----


def test_srt_as_videomme_has_it(tmp_path):
    lines = read_subtitles(write(tmp_path, "a.srt", "\ufeff" + SRT))
    assert lines == [
        *LINES, Line(4.5, 5.0, ""), Line(5.0, 6.5, "it burns & burns"), Line(3600.0, 3601.0, "an hour later"),
    ]  # fmt: skip


def test_webvtt_without_its_notes_names_and_tags(tmp_path):
    assert read_subtitles(write(tmp_path, "a.vtt", VTT)) == LINES


@pytest.mark.parametrize(
    "told",
    [
        [{"start": 3.0, "end": 4.0, "text": "42"}, {"start": 0.16, "end": 2.319, "text": "we light\nthe first candle"}],
        [{"start": "00:00:00.160", "end": "00:00:02.319", "line": "we light <video>the first candle"},
         {"start": "00:00:03,000", "end": "4", "line": "42"}],
        {"segments": [{"timestamp": [0.16, 2.319], "text": " we light the first candle"},
                      {"timestamp": [3, 4], "text": "42"}]},
    ],
)  # fmt: skip
def test_json_in_the_usual_forms(tmp_path, told):
    assert read_subtitles(write(tmp_path, "a.json", told)) == LINES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.srt", b"nothing here", "there are no subtitles in it"),
        (
            "a.srt",
            "1\n00:00:01,000 --> 00:00:02,000\nZo\u00eb".encode("latin-1"),
            r"cannot be read \(UnicodeDecodeError",
        ),
        ("a.json", b"[{", r"cannot be read \(JSONDecodeError"),
        ("a.json", b'{"a": 1}', r"cannot be read \(KeyError: 'segments'"),
        ("a.json", b"[" * 100_000, r"cannot be read \(JSONDecodeError: more than"),
        ("a.json", b'[{"start": 1e999, "end": 2, "text": "x"}]', r"cannot be read \(ValueError: a time must be"),
        ("a.json", b'[{"start": 1' + b"0" * 400 + b', "end": 2, "text": "x"}]', r"cannot be read \(ValueError: a time"),
        ("a.json", b'[{"start": 1}]', r"cannot be read \(KeyError: 'end'"),
        ("a.json", b'{"segments": "x"}', r"subtitles are a list of lines, got str"),
        ("missing.srt", None, "the file does not exist"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnusableSample, match=message):
        read_subtitles(tmp_path / name)


def test_an_empty_file_has_no_lines_and_a_changed_one_is_read_again(tmp_path):
    path = write(tmp_path, "a.srt", "")
    assert read_subtitles(path) == []
    write(tmp_path, "a.srt", SRT)
    os.utime(path, ns=(1, 1))
    assert len(read_subtitles(path)) == 5


# ---- the cut ----


def test_every_nth_line_is_kept_by_hand():
    texts = ["aaaa", "bbbb", "cccc", "dddd", "eeee"]
    assert take_fitting(texts, 24) == texts  # five of four, and four line ends
    assert take_fitting(texts, 23) == ["aaaa", "cccc", "eeee"]
    assert take_fitting(texts, 13) == ["aaaa", "dddd"]
    assert take_fitting(texts, 8) == ["aaaa"]
    assert take_fitting(texts, 3) == ["aaa"]
    assert take_fitting([], 3) == []


@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=30), st.integers(1, 80))
def test_what_is_kept_fits_and_is_spread_evenly(texts, max_chars):
    kept = take_fitting(texts, max_chars)
    assert len("\n".join(kept)) <= max_chars
    assert kept in [texts[::step] for step in range(1, len(texts) + 1)] or kept == [
        text[:max_chars] for text in texts[:1]
    ]


# ---- in a prompt ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with one video of 8 to 10 s, its subtitles, and nothing for the other videos."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    generate_videos(folder, SyntheticConfig(1, 1, 1, scene_s=2.0, size=56))
    (folder / "subtitle").mkdir()
    write(folder / "subtitle", "train_000000.srt", SRT)
    return folder


def asked(clip: Path, row: Row | None = None, template: str = "{subtitles}{problem}", **options) -> str:
    """What the family is asked, with one frame every two seconds: at 1, 3, 5, ..."""
    texts: list[str] = []

    class Listening(type(vl_family())):
        def render(self, row, text, frames, response):
            texts.append(text)
            return super().render(row, text, frames, response)

    family = vl_family()
    family.__class__ = Listening
    blind = options.pop("blind", False)
    known = {"source": str(clip / "subtitle"), "heading": "Spoken:"}
    renderer = RowRenderer(
        family, VideoSampling(fps=0.5, min_frames=1), question_template=template, blind=blind,
        subtitles=Subtitles(**{**known, **options}),
    )  # fmt: skip
    renderer(row or question(clip))
    return texts[0]


def question(clip: Path, **changes) -> Row:
    row = Row("1", "Who speaks?", "Ann", task="open_ended", videos=(str(clip / "videos" / "train_000000.mp4"),))
    return replace(row, **changes)


def test_lines_on_show_at_a_sampled_frame_stand_before_the_question(clip):
    assert asked(clip) == "Spoken:\nwe light the first candle\n42\nit burns & burns\n\nWho speaks?"
    assert asked(clip, template="{problem} {subtitles}") == "Who speaks? Spoken:\nwe light the first candle\n42\nit " \
        "burns & burns\n\n"  # fmt: skip


def test_of_a_part_of_the_video_only_its_lines_are_shown(clip):
    part = question(clip, metadata={"span_s": [2.5, 4.2]})
    assert asked(clip, part, lines="all", times=True) == "Spoken:\n[0:03] 42\n\nWho speaks?"


def test_all_lines_of_the_video_but_none_behind_its_end(clip):
    found = asked(clip, lines="all", times=True)
    assert found == "Spoken:\n[0:00] we light the first candle\n[0:03] 42\n[0:05] it burns & burns\n\nWho speaks?"


def test_too_many_lines_are_thinned(clip):
    assert asked(clip, max_chars=43) == "Spoken:\nwe light the first candle\nit burns & burns\n\nWho speaks?"


def test_a_video_without_subtitles_leaves_nothing_in_the_prompt(clip):
    other = question(clip, videos=(str(clip / "videos" / "eval_000000.mp4"),))
    assert asked(clip, other) == asked(clip, source=None) == "Who speaks?"


def test_what_stands_behind_them_or_in_their_place_may_be_said(clip):
    assert asked(clip, lines="all", max_chars=5, ending="\n") == "Spoken:\nwe li\nWho speaks?"
    other = question(clip, videos=(str(clip / "videos" / "eval_000000.mp4"),))
    assert asked(clip, other, ending="\n", absent="None.") == "Spoken:\nNone.\nWho speaks?"
    assert asked(clip, other, source=None, absent="None.") == "Who speaks?"


def test_a_blind_question_drops_them_or_keeps_all_of_them(clip):
    assert asked(clip, blind=True) == "Who speaks?"
    kept = asked(clip, blind=True, when_blind="keep")
    assert kept == "Spoken:\nwe light the first candle\n42\nit burns & burns\nan hour later\n\nWho speaks?"
    again = without_media(question(clip))  # as a checkpoint has the row of such a prompt
    assert asked(clip, again, blind=True, when_blind="keep") == kept


@pytest.mark.parametrize(
    "told", ["subtitle/train_000000.srt", ["subtitle/train_000000.srt"], [{"start": 3, "end": 4, "text": "42"}], "42"]
)
def test_a_record_may_bring_its_own(clip, told):
    record = published.canonical(video="videos/train_000000.mp4", subtitles=told)
    (row,) = make_rows([record], canonical_row, str(clip))
    text = asked(clip, row, source="record", lines="frames")
    assert text.startswith("Spoken:\n")
    assert "42" in text
    assert text.endswith("\n\nWhat falls?\nA. a cup\nB. a plate")


def test_lines_that_roll_up_are_said_once_and_videos_share_the_room(clip, tmp_path):
    lines = [{"start": n, "end": n + 1, "text": "la"} for n in range(4)]
    row = question(clip, videos=(str(clip / "videos" / "train_000000.mp4"),) * 2, metadata={"subtitles": lines})
    assert asked(clip, row, source="record", lines="all") == "Spoken:\nla\n\nWho speaks?"
    assert asked(clip, replace(row, metadata={}), max_chars=50).count("we light the first candle") == 2


def test_broken_subtitles_skip_the_row_and_list_the_file(clip, tmp_path):
    write(tmp_path, "train_000000.srt", "nothing")
    module = LongVideoReason(
        vl_family(), test=str(clip / "train.jsonl"), subtitles=Subtitles(str(tmp_path)), skipped_dir=str(tmp_path),
        max_skipped_share=1.0, video=VideoSampling(fps=0.5, min_frames=1),
    )  # fmt: skip
    module.setup("test")
    with pytest.raises(ValueError, match=r"4 of all 4 cannot be used, .* there are no subtitles in it"):
        list(module.test_dataloader())


# ---- options ----


def test_the_default_question_shows_them_and_is_the_same_without(clip):
    plain = DEFAULT_QUESTION.replace("{subtitles}", "").replace("{problem}", "Who speaks?")
    assert asked(clip, source=None, template=DEFAULT_QUESTION) == plain
    assert asked(clip, template=DEFAULT_QUESTION).endswith("\n\n" + plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, r"data\.subtitles\.source must be a folder or `record`, got 'nowhere'"),
        ({"source": "record", "max_chars": 0}, r"data\.subtitles\.max_chars must be at least 1, got 0"),
    ],
)
def test_an_impossible_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Subtitles(**options)


def test_a_template_without_a_place_for_them_is_refused():
    with pytest.raises(ValueError, match=r"data\.subtitles\.source=record is shown where data\.question_template says"):
        LongVideoReason(vl_family(), subtitles=Subtitles("record"), question_template="{problem}")


def test_a_folder_without_any_of_the_videos_subtitles_is_refused(clip, tmp_path):
    module = LongVideoReason(vl_family(), test=str(clip / "eval.jsonl"), subtitles=Subtitles(str(clip / "subtitle")))
    with pytest.raises(ValueError, match=r"none of the 4 rows of data\.test has subtitles in .*; correct it, or set"):
        module.setup("test")


def test_videomme_finds_the_subtitles_of_its_videos_by_their_ids(tmp_path):
    (row,) = make_rows([published.video_mme()], video_mme_row, str(tmp_path))
    write(tmp_path, "fFjv93ACGo8.srt", SRT)
    assert asked(tmp_path, row, source=str(tmp_path), blind=True, when_blind="keep").startswith("Spoken:\nwe light")


@pytest.mark.parametrize("start", [float("inf"), float("nan"), 10**400, "1:" + "9" * 400])
def test_lines_at_no_time_make_a_row_unusable(start):
    row = Row("1", "Who?", "x", metadata={"subtitles": [{"start": start, "end": None, "text": "a"}]})
    with pytest.raises(UnusableSample, match="its own subtitles cannot be read"):
        subtitle_text(row, Subtitles(source="record", lines="all", times=True, when_blind="keep"), None)


WORDS = [
    {"text": word, "start_time": n / 2, "end_time": n / 2 + 0.5} for n, word in enumerate(("so", "so", "he", "runs"))
]


def test_words_with_times_are_written_behind_each_other(tmp_path):
    """As `subtitle_concat_all` of Video-MME-v2 joins them: by blanks, repeats and all."""
    file = tmp_path / "001.jsonl"
    file.write_text("".join(json.dumps(word) + "\n" for word in WORDS))
    assert read_subtitles(file)[1] == Line(0.5, 1.0, "so")
    row = Row("1", "?", "A", videos=("001.mp4",), metadata={"subtitles": str(file)})
    options = Subtitles("record", "all", words=True, heading="Said:", ending="\n")
    assert subtitle_text(row, options, []) == "Said:\nso so he runs\n"
    assert subtitle_text(row, replace(options, words=False), []) == "Said:\nso\nhe\nruns\n"
    assert subtitle_text(row, replace(options, max_chars=8), []) == "Said:\nso he\n"


def test_times_of_a_file_may_begin_before_the_video(tmp_path):
    file = tmp_path / "001.jsonl"
    file.write_text("".join(json.dumps(word) + "\n" for word in WORDS))
    row = Row("1", "?", "A", metadata={"subtitles": str(file), "subtitles_from_s": 1.0, "span_s": [0.0, 0.4]})
    assert subtitle_text(row, Subtitles("record", "all", times=True), []) == "The video's subtitles:\n[0:00] he\n\n"


def test_options_of_earlier_releases_name_answers_as_they_did():
    assert Subtitles().identity() == {
        "source": None, "lines": "frames", "max_chars": 8000, "times": False,
        "heading": "The video's subtitles:", "ending": "\n\n", "absent": None, "when_blind": "drop",
    }  # fmt: skip
    assert Subtitles(words=True).identity()["words"] is True
