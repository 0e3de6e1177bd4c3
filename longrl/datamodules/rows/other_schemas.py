"""Which row function reads records: of a set that none is named for, and of those that do not fit the one that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from longrl.datamodules.rows.lmms_eval import lmms_eval_row
from longrl.datamodules.rows.published import canonical_row, video_r1_row
from longrl.datamodules.rows.question_rows import RowFunction, longvideo_reason_row, make_rows, text_math_row
from longrl.datamodules.rows.sources import Record
from longrl.types import Row

TRIED: tuple[RowFunction, ...] = (canonical_row, lmms_eval_row, video_r1_row, text_math_row)
"""Those that read records of many spellings, the most general one first."""
MAX_TRIED = 100
"""Records that are tried; a set has few schemas."""
MAX_PASSED = 10_000
"""Records of which those that do not fit are looked for."""
MEDIA_FIELDS = ("video", "videos", "image", "images", "audio", "audios", "path", "video_path", "video_name")
OPTION_FIELDS = ("options", "choices")


def best_row_function(records: Sequence[Record], media_root: str | None) -> tuple[RowFunction, str | None]:
    """The row function that reads most of the first records, and its import path, which is None if it reads none.

    Args:
        records: of a source.
        media_root: of the source.
    """
    candidates = (TRIED[0], longvideo_reason_row, *TRIED[1:])
    counts = [sum(_reads(function, record, media_root) for record in records[:MAX_TRIED]) for function in candidates]
    best = candidates[counts.index(max(counts))]
    return best, _import_path(best) if max(counts) else None


def suggest_row_function(records: Iterable[Record], row_function: RowFunction, media_root: str | None) -> str | None:
    """A sentence that names the function which would read records that `row_function` does not; None without any.

    Args:
        records: of a source; those that fit are passed over.
        row_function: the configured one.
        media_root: of the source.
    """
    first = islice(records, MAX_PASSED)
    misfits = list(islice((record for record in first if not _reads(row_function, record, media_root)), MAX_TRIED))
    counts = {
        function: sum(_reads(function, record, media_root) for record in misfits)
        for function in TRIED
        if function is not row_function
    }
    best = max(counts, key=lambda function: counts[function])
    if not counts[best]:
        return None
    fits = f"{counts[best]} of the first {len(misfits)} of them" if len(misfits) > 1 else "this record"
    return f"{fits} would be read by --data.row_function {_import_path(best)}"


def _import_path(function: RowFunction) -> str:
    return f"longrl.datamodules.rows.{getattr(function, '__name__', function)}"


def _reads(function: RowFunction, record: Record, media_root: str | None) -> bool:
    """True if a function makes usable rows of a record, and leaves none of its media, options and reasoning out."""
    rows = make_rows([record], function, media_root)
    has_media = any(_is_given(record.get(name)) for name in MEDIA_FIELDS)
    has_options = any(_is_given(record.get(name)) for name in OPTION_FIELDS)
    has_reasoning = _is_given(record.get("reasoning"))
    return bool(rows) and all(
        isinstance(row, Row)
        and (not has_media or bool(row.videos or row.images or row.audios))
        and (not has_options or row.task == "multiple_choice")
        and (not has_reasoning or bool(row.reasoning or row.trace or row.response))
        for row in rows
    )


def _is_given(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
