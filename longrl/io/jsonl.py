"""JSON of others, and files of one object per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from longrl.io.atomic import atomic_file
from longrl.io.text_files import utf8_file

MAX_DEPTH = 100
"""Levels of lists and objects in each other; much deeper ones end in errors of recursion wherever they are handled."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that anyone may have written.

    Raises:
        json.JSONDecodeError: it is no JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    deep = json.JSONDecodeError(f"more than {MAX_DEPTH} lists and objects in each other", "", 0)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise deep from None
    except ValueError as error:  # digits, or bytes in no encoding
        raise json.JSONDecodeError(str(error), "", 0) from error
    openings = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, openings)) > MAX_DEPTH and _is_deep(value):  # type: ignore[arg-type]
        raise deep
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Writes one JSON object per line; readers see the old file or all of the new one, never a part."""
    with atomic_file(path) as file:
        for record in records:
            # A lone surrogate becomes its escape, by which it is read again.
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    return Path(path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads the objects of a file, one per line; blank lines are skipped.

    Raises:
        ValueError: a line is no JSON object; the message says which.
    """
    records = []
    with utf8_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error}; is the file cut off?") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} of {path} must hold a record, got {type(record).__name__}")
            records.append(record)
    return records


def drop_records(path: str | Path, is_repeated: Callable[[dict[str, Any]], bool]) -> int:
    """Takes records out of a file, and lines that a killed process left half; other lines stay as they are.

    Args:
        path: one that is not there stays so.
        is_repeated: True of a record that goes.

    Returns:
        How many lines went.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:  # also of bytes that are no text
            continue
        if isinstance(record, dict) and not is_repeated(record) and line.endswith(b"\n"):
            kept.append(line)
    if len(kept) < len(lines):
        with atomic_file(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)
