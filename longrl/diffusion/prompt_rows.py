"""Prompts for generated pictures and videos: files of them, and the functions that make `Row`s of their records.

A row's `problem` is the prompt, its `metadata` what else its record says, for rewards to check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrl.datamodules.rows.question_rows import Record, RowFunction
from longrl.datamodules.rows.sources import read_records
from longrl.diffusion.rewards.ocr import quoted_text
from longrl.io.jsonl import parse_json
from longrl.types import Row


def prompt_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A record with a `prompt`. `id`, `answer` (text that is to be seen, say) and `category` or `tag` may be absent.

    Every other field becomes metadata.

    Raises:
        ValueError: no prompt.
    """
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"a record needs its text in 'prompt', got {json.dumps(record, default=str)[:200]}")
    named = ("id", "prompt", "answer", "category")
    return Row(
        id=str(record.get("id", index)),
        problem=prompt.strip(),
        answer=str(record.get("answer") or ""),
        task="generation",
        category=str(record.get("category") or record.get("tag") or "general"),
        metadata={name: value for name, value in record.items() if name not in named},
    )


def geneval_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A record of GenEval (arXiv:2310.11513): `tag` (single_object, counting, ...), `include` and perhaps `exclude`.

    `include` lists what must be seen: `{"class": "bench", "count": 2}`, perhaps with `color` and `position`. Detectors
    that check it are the user's: `terms: [{function: my_rewards.py:geneval}]` reads them from `row.metadata`.

    Raises:
        ValueError: a field is missing, or an object has no class or count.
    """
    row = prompt_row(record, index, media_root)
    objects = record.get("include")
    if not isinstance(record.get("tag"), str) or not isinstance(objects, list):
        raise ValueError(f"a GenEval record needs 'tag' and a list 'include', got {sorted(record)}")
    bad = [item for item in objects if not isinstance(item, dict) or not {"class", "count"} <= item.keys()]
    if bad:
        raise ValueError(f"an object in 'include' of a GenEval record needs 'class' and 'count', got {bad[0]!r}")
    return row


def ocr_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A prompt that asks for text, in double quotes or in the field `answer`, which the row's answer then is.

    Raises:
        ValueError: there is neither.
    """
    row = prompt_row(record, index, media_root)
    return row if row.answer else replace(row, answer=quoted_text(row.problem))


def read_prompts(source: str, row_function: RowFunction) -> list[Row | ValueError]:
    """The row of every prompt in a source, or the error that says what is wrong with it and where.

    Args:
        source: a `.txt` file with a prompt per line or a `.jsonl` file with a record per line, both without regard to
            empty lines; or what `longrl.datamodules.rows.sources.read_records` reads.
        row_function: gets the number of the line, from 1 on, as its index.

    Raises:
        ValueError: there is no such source, or nothing in it.
    """
    path = Path(source).expanduser()
    items: Iterable[tuple[int, Any]]
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise ValueError(
                f"the prompt file {source!r} does not exist (working folder: {Path.cwd()}); correct the path"
            )
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        items = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        unit = "line"
        parse: Callable[[Any], Record] = _text_record if path.suffix == ".txt" else _json_record
    else:
        items = enumerate(read_records(source), start=1)
        unit = "record"
        parse = dict
    rows: list[Row | ValueError] = []
    for number, item in items:
        try:
            made = row_function(parse(item), number, None)
            rows += [made] if isinstance(made, Row) else made
        except ValueError as error:
            rows.append(ValueError(f"{unit} {number} of {source}: {error}"))
    if not rows:
        raise ValueError(f"{source} holds no prompt; write one on each line")
    return rows


def _text_record(line: bytes) -> Record:
    return {"prompt": _decoded(line).strip()}


def _json_record(line: bytes) -> Record:
    try:
        record: Any = parse_json(_decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}; a file of plain prompts is named .txt") from error
    if not isinstance(record, dict):
        raise ValueError(f'a line must hold a record such as {{"prompt": ...}}, got {type(record).__name__}')
    return record


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}; save the file as UTF-8") from error
