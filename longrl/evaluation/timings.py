"""What an evaluation measured of itself: timings.jsonl, a line per answer, and command.json, how it was called.

These differ from run to run, as results.json and samples.jsonl never do.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrl.evaluation.outcomes import Outcome
from longrl.io.atomic import atomic_write
from longrl.io.jsonl import read_jsonl, write_jsonl
from longrl.io.secrets import mask_secrets
from longrl.io.shipped_files import name_of
from longrl.types import Row

TIMINGS_FILE = "timings.jsonl"
COMMAND_FILE = "command.json"


def write_timings(folder: Path, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Writes what was measured of each answer; no file where nothing was, as of answers of an earlier release."""
    lines: list[dict[str, Any]] = []
    for outcome in outcomes:
        for index, answer in sorted(outcome.answers.items()):
            if answer.measured:
                lines.append({"condition": outcome.name, "doc_id": index, "id": rows[index].id, **answer.measured})
    if lines or (folder / TIMINGS_FILE).exists():
        write_jsonl(folder / TIMINGS_FILE, lines)


def read_timings(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What was measured, by condition and number of the question; {} where there is no file."""
    if not (folder / TIMINGS_FILE).is_file():
        return {}
    return {(line["condition"], line["doc_id"]): line for line in read_jsonl(folder / TIMINGS_FILE)}


def write_command(folder: Path, args: Sequence[str], prog: str = "python -m longrl") -> None:
    """Writes the command line of an evaluation, without keys.

    Args:
        folder: of the evaluation.
        args: behind `prog`.
        prog: the program.
    """
    command = mask_secrets(f"{prog} {shlex.join(map(name_of, args))}")
    atomic_write(folder / COMMAND_FILE, json.dumps({"command": command}, indent=2, ensure_ascii=False) + "\n")


def read_command(folder: Path) -> str | None:
    """The command that makes an evaluation again; None where nobody wrote it down."""
    if not (folder / COMMAND_FILE).is_file():
        return None
    return str(json.loads((folder / COMMAND_FILE).read_text(encoding="utf-8"))["command"])
