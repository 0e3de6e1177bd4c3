"""Row functions of benchmarks with answers in one's own words, which a model judges (`reward` of `evaluate`)."""

from __future__ import annotations

from longrl.datamodules.rows.published import video_row
from longrl.datamodules.rows.record_fields import text_field
from longrl.datamodules.rows.sources import Record
from longrl.types import Row

ACTIVITYNET_TYPES = (
    "Motion", "Spatial Relation", "Temporal Relation", "Yes/No", "Color", "Object", "Location", "Number", "Other",
)  # fmt: skip
"""Types of ActivityNet-QA, 0 to 8: of the question, and from 3 on of the answer to a free one."""


def activitynet_qa_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of ActivityNet-QA (arXiv:1906.02467), whose released files go together: `test_q.json+test_a.json`.

    The category is its type. `asked` has a capital and a question mark, as lmms-eval asks it.
    """
    question, kind = text_field(record, "question", index), text_field(record, "type", index)
    video = text_field(record, "video_name", index)
    if kind not in map(str, range(len(ACTIVITYNET_TYPES))):
        raise ValueError(f"record {index}: 'type' of ActivityNet-QA must be 0 to 8, got {kind!r}; correct it")
    fields = {
        "options": None,
        "task": "open_ended",
        "category": ACTIVITYNET_TYPES[int(kind)],
        "metadata": {"video_id": video, "asked": f"{question.capitalize()}?"},
    }
    return video_row(record, index, media_root, video if video.startswith("v_") else f"v_{video}", fields)
