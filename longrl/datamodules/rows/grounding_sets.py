"""Row functions of temporal grounding: a sentence, and when it happens in the video (task `temporal_iou`).

The metadata's `asked` is the sentence alone, which a template puts into its own words: `'{asked}' happens when?`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from longrl.datamodules.rows.published import each_row, video_row
from longrl.datamodules.rows.question_rows import first_field, missing_field_error, text_field
from longrl.datamodules.rows.sources import LINE_FIELD, NAME_FIELD, Record
from longrl.types import Row

CHARADES_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>[\d.]+)\s+(?P<end>[\d.]+)\s*##(?P<sentence>.+)")
SET_OF_NAME = (("activitynet", re.compile(r"v_.{11}")), ("qvhighlights", re.compile(r".+_\d+\.\d+_\d+\.\d+")))
"""How a video of TimeLens-Bench is named -> the set it is from; Charades has names of five letters."""


def charades_sta_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A sentence of Charades-STA (arXiv:1705.02101): a line `video start end##sentence` of its text files.

    Records of the hub have the same in `video`, `caption` and `timestamp`, two seconds.
    """
    if LINE_FIELD in record:
        match = CHARADES_LINE.fullmatch(text_field(record, LINE_FIELD, index))
        if match is None:
            raise ValueError(
                f"record {index} must be a line 'video start end##sentence', got {record[LINE_FIELD]!r:.100}; "
                "correct it"
            )
        video, sentence = match["video"], match["sentence"]
        span: Any = (match["start"], match["end"])
    else:
        video, sentence = text_field(record, "video", index), text_field(record, "caption", index)
        span = record.get("timestamp") or ()
    row_id = f"{video.partition('.')[0]}-{index}"
    return _grounding_row(record, index, media_root, row_id, video, sentence, span, "charades", {})


def timelens_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """All sentences on a video of TimeLens-Bench or TimeLens-100K (arXiv:2512.14698); the category is the set's name.

    The benchmark's files have `spans` and `queries` under the name of each video, the training set `events` of a
    `video_path`, and lmms-eval's one `query` with its `span`.
    """
    video = str(first_field(record, "video_path", NAME_FIELD, default=""))
    if not video:
        raise missing_field_error(record, index, "video_path", f", and so is {NAME_FIELD!r}")
    if "queries" in record:
        queries, spans = (list(record.get(name) or ()) for name in ("queries", "spans"))
        if len(queries) != len(spans) or not queries:
            raise ValueError(
                f"record {index} (id {video!r}): 'queries' and 'spans' must be as many, at least one, got "
                f"{len(queries)} and {len(spans)}; correct it"
            )
        events = [{"query": query, "span": span} for query, span in zip(queries, spans, strict=True)]
    else:
        events = record.get("events") or [record]
    stem = video.rpartition("/")[2].removesuffix(".mp4")
    named = next((name for name, pattern in SET_OF_NAME if pattern.fullmatch(stem)), "charades")
    category = str(first_field(record, "source", default=named))

    def row(event: Mapping[str, Any], position: int) -> Row:
        query, span = event.get("query"), event.get("span")
        if isinstance(span, Sequence) and not isinstance(span, str) and span and isinstance(span[0], Sequence):
            span = span[0]
        sentence = re.sub(r"\s+", " ", str(query or "")).strip().strip(".").strip()
        row_id = f"{stem}-{position if len(events) > 1 else index}"
        extra = {"duration": record.get("duration")}
        return _grounding_row(record, index, media_root, row_id, video, sentence, span, category, extra)

    return each_row(events, index, row)


def _grounding_row(
    record: Mapping[str, Any],
    index: int,
    media_root: str | None,
    row_id: str,
    video: str,
    sentence: str,
    span: Any,
    category: str,
    extra: Mapping[str, Any],
) -> Row:
    """The row of a sentence; a span that is no two increasing seconds is an error."""
    sentence = sentence.strip().removesuffix(".").strip()
    if not sentence:
        raise ValueError(f"record {index} (id {row_id!r}) needs a sentence to look for, got none; correct it")
    try:
        start, end = (float(second) for second in (() if isinstance(span, str) else span))
    except (TypeError, ValueError):
        start, end = 0.0, 0.0
    if not 0 <= start < end < float("inf"):
        raise ValueError(
            f"record {index} (id {row_id!r}): a sentence must happen between two increasing seconds, "
            f"got {span!r}; correct it"
        )
    fields = {
        "id": row_id,
        **when_fields(sentence, start, end),
        "options": None,
        "category": category,
        "metadata": {"asked": sentence, **extra},
    }
    return video_row(record, index, media_root, video, fields)


def when_fields(sentence: str, start_s: float, end_s: float) -> dict[str, str]:
    """Question, answer and task of a row that asks when a sentence happens."""
    return {
        "question": f'When does this happen in the video: "{sentence}"? Give its start and its end in seconds.',
        "answer": f"{start_s:g} to {end_s:g} seconds",
        "task": "temporal_iou",
    }
