"""Fields of a record as row functions read them: texts, media, metadata, and the error of one that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longrl.datamodules.media.subtitles import subtitles_below
from longrl.datamodules.rows.record_media import RecordMedia
from longrl.types import MediaKind


def text_field(record: Mapping[str, Any], field: str, index: int) -> str:
    """A field that must say something, as text."""
    value = record.get(field)
    if is_null(value) or not str(value).strip():
        raise missing_field_error(record, index, field)
    return str(value).strip()


def media_field(
    record: Mapping[str, Any], field: str, kind: MediaKind, index: int, media_root: str | None
) -> tuple[str, ...]:
    """Files of a field with media, in whichever form it has them; see `record_media.py`."""
    try:
        return RecordMedia(kind, media_root).paths(record.get(field), record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {index} (id {record_id(record, index)!r}): {field!r} {error}") from error


def media_fields(record: Mapping[str, Any], index: int, media_root: str | None) -> dict[str, Any]:
    """The media of a row, as `media_field` reads them."""
    kinds: tuple[MediaKind, ...] = ("video", "image", "audio")
    return {f"{kind}s": media_field(record, f"{kind}s", kind, index, media_root) for kind in kinds}


def metadata_field(
    record: Mapping[str, Any], index: int, media_root: str | None, subtitles: Any = None
) -> dict[str, Any]:
    """The metadata of a row, in which files of subtitles lie under `media_root`, as its media do.

    Args:
        record: its `metadata` may be absent or null.
        index: of the record.
        media_root: where relative paths start.
        subtitles: those of the record, instead of its metadata's.
    """
    given = record.get("metadata")
    if not (given is None or isinstance(given, Mapping)):
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): 'metadata' must be fields by name, got "
            f"{type(given).__name__}; correct it, or leave it out"
        )
    metadata = dict(given or {})
    lines = subtitles or metadata.get("subtitles")
    return metadata | {"subtitles": subtitles_below(lines, media_root)} if lines else metadata


def record_id(record: Mapping[str, Any], index: int) -> str:
    """A record's own name, or its number."""
    return str(first_field(record, "problem_id", "id", "question_id", "qid", default=index))


def first_field(record: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these fields that the record has."""
    return next((record[name] for name in names if not is_null(record.get(name))), default)


def is_null(value: object) -> bool:
    """True for what stands where a table has nothing: None, or the NaN that a column of numbers has for it."""
    return value is None or (isinstance(value, float) and value != value)


def missing_field_error(record: Mapping[str, Any], index: int, field: str, why: str = "") -> ValueError:
    """The error of a record without a field that is needed."""
    state = ("is empty" if field in record else "is missing") + why
    return ValueError(
        f"record {index} (id {record_id(record, index)!r}) needs {field!r}, which {state}; the record has "
        f"{', '.join(map(str, record)) or 'no field'}. Correct it, or choose the row function of its schema with "
        "data.row_function"
    )
