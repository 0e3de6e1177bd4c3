"""Files of rows that nobody can read, and rows that hold anything."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import fit, kept_checkpoint, text_rows, text_run, write_rows

WIDE = {"problem_id": "w", "problem": "Wer f\u00e4hrt?", "answer": "Ann", "task": "exact"}
ODD_ROWS: list[dict[str, Any]] = [
    {"problem_id": "surrogate", "problem": "What is \ud800?", "answer": "x", "task": "exact"},
    {"problem_id": "span", "problem": "What?", "answer": "x", "task": "exact", "metadata": {"span_s": "soon"}},
]
CONTROL_ROW = {
    "problem_id": "tokens", "problem": "What does <|im_end|> or <image_pad> do?", "answer": "x", "task": "exact",
}  # fmt: skip
NUM_ROWS = 12
LONG_MB = 100


def _with_content(content: bytes, suffix: str = "jsonl") -> Callable[[Path], Outcome]:
    """A run whose data file holds these bytes."""

    def run(folder: Path) -> Outcome:
        values = text_run(folder)
        source = folder / f"rows.{suffix}"
        source.write_bytes(content)
        values["data"]["train"] = str(source)
        ended = fit(folder, values)
        return Outcome(ended.last_line, ended.exit_code, kept_checkpoint(folder))

    return run


def _lines(*more: bytes) -> bytes:
    rows = [json.dumps(row).encode() for row in text_rows(NUM_ROWS)]
    return b"\n".join([*rows[:5], *more, *rows[5:]]) + b"\n"


def _text_lines() -> str:
    return "".join(json.dumps(row | {"reasoning": "f\u00e4hrt"}, ensure_ascii=False) + "\n" for row in text_rows())


def byte_order_mark(folder: Path) -> Outcome:
    """As Windows writes it."""
    outcome = _with_content(codecs.BOM_UTF8 + _text_lines().replace("\n", "\r\n").encode())(folder)
    return Outcome(f"trained to the end, {outcome.kept}", outcome.exit_code, outcome.kept)


def skipped_record(folder: Path) -> Outcome:
    """One record in twelve has no answer, and may be left out."""
    values = text_run(folder, rows=[*text_rows(NUM_ROWS), {"problem": "What?"}])
    ended = fit(folder, values, "--data.bad_records=skip")
    return Outcome(ended.line_with("skipped train row"), ended.exit_code, kept_checkpoint(folder))


def odd_rows(folder: Path) -> Outcome:
    """Rows that break when they are drawn; the run goes on, and on again."""
    rows = [*ODD_ROWS, CONTROL_ROW, *text_rows(NUM_ROWS)]
    values = text_run(folder, rows=rows, steps=8)
    first = fit(folder, values, "--data.max_skipped_share=0.5")
    values["trainer"]["max_steps"] = 10
    last = f"--ckpt_path={folder / 'run' / 'checkpoints' / 'last.ckpt'}"
    ended = fit(folder, values, "--data.max_skipped_share=0.5", last)
    listed = [json.loads(line)["id"] for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    seen = f"skipped: {', '.join(sorted(listed))}; resumed with {ended.exit_code}"
    return Outcome(seen, first.exit_code, kept_checkpoint(folder))


def long_line(folder: Path) -> Outcome:
    """A question of megabytes."""
    values = text_run(folder)
    source = folder / "rows.jsonl"
    problem = "word " * (LONG_MB * 1_000_000 // 5)
    write_rows(source, [{"problem_id": "long", "problem": problem, "answer": "x"}, *text_rows(NUM_ROWS)])
    ended = fit(folder, values | {"trainer": values["trainer"] | {"max_steps": 7}}, limit_s=300)
    return Outcome(ended.line_with("characters, at least"), ended.exit_code, kept_checkpoint(folder))


def _fault(fault: str, content: bytes, seen: str, suffix: str = "jsonl") -> Fault:
    return Fault(kind="records", fault=fault, does=_with_content(content, suffix), exit_code=2, seen=seen)


FAULTS = [
    _fault("a data file in latin-1", _text_lines().encode("latin-1"), r"line 1 of .*rows.jsonl is no UTF-8.*iconv"),
    _fault("a data file in UTF-16", _text_lines().encode("utf-16"), r"rows.jsonl is UTF-16, and must be UTF-8; save"),
    _fault("a line that is cut off", _lines(b'{"problem": "Wh'), r"line 6 of .*rows.jsonl is no JSON.*cut off"),
    _fault("a line that is a list", _lines(b"[1, 2]"), r"line 6 of .*rows.jsonl must hold a record, got list"),
    _fault("an empty data file", b"", r"rows.jsonl holds no record; give a source with at least one"),
    _fault(
        "a record whose videos are a number",
        _lines(b'{"problem": "What?", "answer": "x", "videos": 7}'),
        r"record 5 .*'videos' must hold file paths or media, got int '7'.*data.bad_records=skip",
    ),
    _fault(
        "a record whose task is a list",
        _lines(b'{"problem": "What?", "answer": "x", "task": ["exact"]}'),
        r"record 5 .*'task' must be a text.*data.bad_records=skip",
    ),
    _fault("a parquet file of nothing", b"", r"rows.parquet is no parquet file.*is it cut off", "parquet"),
    _fault("a parquet file of garbage", b"PAR1" + bytes(200) + b"PAR1", r"rows.parquet is no parquet file", "parquet"),
    Fault("records", "a byte order mark and CRLF", byte_order_mark, 0, "checkpoint of step 6"),
    Fault("records", "a record without an answer, bad_records: skip", skipped_record, 0, "answer"),
    Fault(
        kind="records",
        fault="a lone surrogate, an odd span_s and control tokens in rows, resumed",
        does=odd_rows,
        exit_code=0,
        seen="skipped: .*surrogate.*; resumed with 0",
    ),
    Fault(
        kind="records",
        fault=f"a line of {LONG_MB} MB",
        does=long_line,
        exit_code=0,
        seen="characters, at least .* tokens: more than",
        limit_s=300,
        quick=False,
    ),
]
