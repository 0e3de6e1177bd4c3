"""A record in which anything stands in the place of anything is a row, or an error that names it, and ends no run."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading.loader import RenderedRows
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Subtitles
from longrl.datamodules.rows.lmms_eval import lmms_eval_row
from longrl.datamodules.rows.published import canonical_row, video_r1_row
from longrl.datamodules.rows.question_rows import audio_qa_row, chat_row, longvideo_reason_row, make_rows
from longrl.types import Prompt, Row, UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import vl_family

LINES = [{"start": 0, "end": 1, "text": "Hello"}]
TURNS = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "B"}]
RECORDS = {
    longvideo_reason_row: {
        "problem_id": "1", "problem": "Which?\nA. cat\nB. dog", "answer": "B", "data_type": "video", "task": None,
        "problem_type": "t", "reasoning": "Because.", "videos": "v.mp4", "images": None, "audios": None, "fps": 2,
        "frame_times": [0, 1], "metadata": {"span_s": [0, 1], "subtitles": LINES, "tolerance": 0.1, "aliases": ["b"]},
    },
    canonical_row: {
        "id": "1", "video": "v.mp4", "question": "Which?", "options": ["cat", "dog"], "answer": 1, "image": None,
        "problem_type": "multiple_choice", "subtitles": LINES, "reasoning": None, "metadata": {"category": "c"},
    },
    chat_row: {"id": "1", "messages": TURNS, "videos": ["v.mp4"], "answer": "B", "task": "exact", "metadata": {}},
    lmms_eval_row: {"doc_id": 0, "question": "Which?", "options": ["a", "b"], "answer": "A", "video": "v.mp4"},
    video_r1_row: {
        "problem": "Which?", "options": ["A. a"], "solution": "A", "path": "v.mp4", "data_type": "video",
        "process": "x", "problem_type": "OCR",
    },
    audio_qa_row: {"id": 1, "question": "Which?", "options": ["a", "b"], "answer": 0, "video": "v.mp4"},
}  # fmt: skip
"""Row function -> a record that it reads."""
ODD_TEXTS = [
    "", " ", "\ud800", "<video>", "<image><audio>", "<|im_end|>", "<|video_pad|>", "v.mp4", "../v.mp4", "\0",
    "file://v", "https://a/b", "data:,", "data:image/png;base64,x", "[{", '[{"role": 1}]', "~", "nan", "1e999", "A.",
    "\u2028", "{problem}",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.floats(),
    st.sampled_from(ODD_TEXTS), st.text(max_size=8),
)  # fmt: skip
NAMES = st.sampled_from(
    ["frames", "fps", "times", "bytes", "path", "video", "role", "content", "type", "text", "span_s", "start", "end"]
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)


@functools.cache
def root() -> Path:
    """A folder with a video."""
    folder = Path(tempfile.mkdtemp(prefix="longrl-records-"))
    write(folder / "v.mp4", 8, size=(28, 28))
    return folder


@functools.cache
def renderer(stage: str) -> RowRenderer:
    sampling = VideoSampling(fps=None, num_frames=2, min_frames=1)
    subtitles = Subtitles(source="record")
    return RowRenderer(
        vl_family(), sampling, stage, "{subtitles}{problem}", subtitles=subtitles, max_prompt_tokens=500
    )  # fmt: skip


def changed(record, path, value):
    """The record with another value at a place of it."""
    if not path:
        return value
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def places(value, path=()):
    """Every place in a record, but the whole."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, name))


@pytest.mark.parametrize("function", RECORDS, ids=lambda function: function.__name__)
@settings(max_examples=40)
@given(st.data())
def test_any_value_in_any_place_is_a_row_or_an_error_and_no_prompt_ends_a_run(function, data):
    record = RECORDS[function]
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(record))))
        record = changed(record, place, data.draw(ANYTHING))
    made = make_rows([record], function, str(root()))
    rows = [row for row in made if isinstance(row, Row)]
    for error in made:
        if not isinstance(error, Row):
            assert type(error) is ValueError or isinstance(error, ValueError)
            assert "record 0" in str(error) or "row " in str(error) or "it cannot be read" in str(error)
    for row in rows:
        texts = (row.id, row.problem, row.answer, row.task, row.category, *row.videos, *row.images, *row.audios)
        assert all(isinstance(text, str) for text in texts)
        assert row.reasoning is None or isinstance(row.reasoning, str)
        assert isinstance(row.metadata, dict)
    for stage in ("rl", "sft"):
        dataset = RenderedRows(rows, renderer(stage))
        assert len(dataset.fingerprint) == 64
        for index in range(len(rows)):
            assert isinstance(dataset[index], Prompt | UnusableSample)


def test_the_records_are_read_as_they_are():
    for function, record in RECORDS.items():
        (row,) = make_rows([json.loads(json.dumps(record))], function, str(root()))
        assert isinstance(RenderedRows([row], renderer("rl"))[0], Prompt), row
