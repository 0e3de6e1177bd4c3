"""Row functions of CG-Bench (arXiv:2412.12075): questions on long videos, and where in the video their clues are."""

from __future__ import annotations

import functools
import math
from typing import Any

from longrl.datamodules.media.sampling import read_span
from longrl.datamodules.rows.published import each_row, video_row
from longrl.datamodules.rows.question_rows import given_options, is_null, missing_field_error, text_field
from longrl.datamodules.rows.sources import Record
from longrl.rewards.options import option_label
from longrl.types import Row

MODES = ("long", "clue", "grounding")
CLUE_FRAMES = 32
"""Most frames of the clues, whatever is shown of whole videos."""
DURATIONS = ("0 ~ 10", "10 ~ 20", "20 ~ 30", "30 ~ 40", "40 ~ 50", "50 ~ 60", "60+")
"""Minutes, as CG-Bench names its groups; ten minutes sharp belong to the first."""
ANSWERS = (
    "You will be provided with sampled frames from a video, along with a multiple-choice question that includes a "
    "question and several answer options.\nYour task is to analyze the provided frames, infer the most plausible "
    "answer based on the visual information.\nIf the video does not provide enough information, infer the answer based "
    "on the options available and still provide a result. Therefore, In all cases, an answer must be given.\nOnly "
    'output the answer in the following format:\n\n```json\n{{"result": "option"}}\n```\n\nThe {0}option{0} is the '
    "uppercase letter corresponding to your answer.\n\n"
)
INSTRUCTIONS = {
    "long": ANSWERS.format('"'),
    "clue": ANSWERS.format("'"),
    "grounding": (
        "You will be provided with uniformly sampled frames from a video and their timestamps, along with a "
        "multiple-choice question that includes a question and several answer options.\nYour task is to determine in "
        "which intervals the 'clue intervals' exist that contain visual information needed to answer the question.\n"
        "Only output the answer in the following format:\n\n"
        '```json\n{"result": [[start1, end1], [start2, end2], ...]}\n```'
        "\n\nIn this output format, each 'start' and 'end' represents the beginning and end of an interval in seconds "
        "where relevant clues can be found.\nYou must provide at least one interval and at most five intervals. "
        "Intervals exceeding five will NOT be considered valid.\n"
    ),
}
"""What its authors say before a question in each mode (`run/utils.py`)."""


def cg_bench_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """A question in all three modes: on the whole video, on its clues alone, and where these are."""
    make = functools.partial(_cg_bench_row, record, index, media_root)
    return each_row(MODES, index, lambda mode, _: make(mode))


def cg_bench_long_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question on the whole video (long-acc)."""
    return _cg_bench_row(record, index, media_root, "long")


def cg_bench_clue_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question on nothing but its clues (clue-acc): at most 32 frames, shared by the length of the intervals."""
    return _cg_bench_row(record, index, media_root, "clue")


def cg_bench_grounding_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """Where the clues to a question are (mIoU): task `temporal_iou`."""
    return _cg_bench_row(record, index, media_root, "grounding")


def _cg_bench_row(record: Record, index: int, media_root: str | None, mode: str) -> Row:
    question = text_field(record, "question", index)
    choices = given_options(record.get("choices") or (), record, index)
    if not choices:
        raise missing_field_error(record, index, "choices")
    clues = _clues(record, index)
    asked = "\n".join(f"{option_label(n)}:{choice}" for n, choice in enumerate(choices))
    metadata = {
        "asked": f"{question}\n\n{asked}",
        "instruction": INSTRUCTIONS[mode],
        "domain": record.get("domain"),
        "sub_category": record.get("sub_category"),
        "duration": _minutes(record.get("duration")),
    }
    fields: dict[str, Any] = {
        "id": f"{text_field(record, 'qid', index)}/{mode}",
        "options": choices,
        "answer": text_field(record, "right_answer", index),
        "task": "multiple_choice",
        "category": mode,
        "metadata": metadata,
    }
    if mode == "clue":
        metadata |= {"parts_s": clues, "parts_frames": CLUE_FRAMES}
    if mode == "grounding":
        lines = [f"{option_label(n)}. {choice}" for n, choice in enumerate(choices)]
        asks = "When in the video is seen what answers this question? Give the start and the end of each such part in"
        fields |= {
            "question": "\n".join([f"{asks} seconds.", question, *lines]),
            "options": None,
            "answer": ", ".join(f"{start:g} to {end:g} seconds" for start, end in clues),
            "task": "temporal_iou",
        }
    return video_row(record, index, media_root, text_field(record, "video_uid", index), fields)


def _clues(record: Record, index: int) -> list[list[float]]:
    clues = record.get("clue_intervals")
    try:
        spans = [list(read_span(span)) for span in clues or ()]
    except (ValueError, TypeError):
        spans = []
    if not spans or any(math.isinf(end) for _, end in spans):
        raise ValueError(
            f"record {index} (qid {record.get('qid')!r}): 'clue_intervals' must be [start, end] in increasing seconds, "
            f"got {clues!r:.100}; correct it"
        )
    return spans


def _minutes(duration_s: Any) -> str | None:
    """The group of a length in seconds."""
    if not isinstance(duration_s, (int, float)) or is_null(duration_s):
        return None
    return DURATIONS[min(max(0, -int(-duration_s // 600) - 1), 6)]
