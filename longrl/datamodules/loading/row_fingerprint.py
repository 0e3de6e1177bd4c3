"""What tells whether rows are those of a checkpoint, also where some that could not be used have been repaired."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl.types import Row

MODULUS = 1 << 256


def row_text(row: Row) -> bytes:
    """What a row says. Folders of media do not count: a data set may be moved."""
    media = [Path(path).name for path in (*row.videos, *row.images, *row.audios)]
    chat: list[Any] = [row.messages, row.response] if row.messages else []
    if row.rejected is not None:
        chat.append([row.response, row.rejected])
    elif row.response is not None and not row.messages:
        chat.append(row.response)
    for message in row.trace:
        chat.append(
            [{**part, **_name_of(part)} for part in message["content"]] if message["role"] == "tool" else message
        )
    return json.dumps([row.id, row.problem, row.answer, row.task, row.reasoning, media, *chat]).encode()


def _name_of(part: Mapping[str, Any]) -> dict[str, str]:
    """Where the medium of a trace's part is, without its folder."""
    return {name: Path(part[name]).name for name in ("path", "video") if name in part}


def fingerprint_without(rows: Sequence[Row], whole: int, left_out: Iterable[int]) -> str:
    """Of all rows but some: a sum, from which single rows can be taken.

    Args:
        rows: all.
        whole: sum of their `row_number`.
        left_out: indices of rows that may say something else.
    """
    rest = whole - sum(row_number(index, row_text(rows[index])) for index in left_out if index < len(rows))
    return f"{rest % MODULUS:064x}"


def row_number(index: int, text: bytes) -> int:
    """The part of a row in a sum: other rows, or the same in another order, have another sum."""
    return int.from_bytes(hashlib.sha256(b"%d " % index + text).digest(), "big")
