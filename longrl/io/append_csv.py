"""CSV files of numbers by steps that grow by lines: cut where a run goes on, and widened by new columns."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longrl.io.atomic import atomic_file, set_aside

logger = logging.getLogger(__name__)


def cut_file(path: Path, first_step: int) -> list[str]:
    """Takes lines of `first_step` and later ones out of a file, and those that a killed process left half.

    Returns:
        The columns; none without a file.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    columns = next(csv.reader([lines[0].decode(errors="replace")]), []) if lines else []
    if "step" not in columns or not lines[0].endswith(b"\n"):
        set_aside(path)  # not a file of ours
        return []
    place = columns.index("step")
    kept = [lines[0]]
    for line in lines[1:]:
        step = step_of(line, place, len(columns))
        if step is not None and step < first_step:
            kept.append(line)
    if len(kept) < len(lines):
        logger.info("%s: %d lines from step %d on are replaced", path, len(lines) - len(kept), first_step)
        with atomic_file(path) as file:
            file.writelines(kept)
    return columns


def step_of(line: bytes, place: int, num_cells: int) -> float | None:
    """The step of a whole line; None for a torn one.

    Args:
        line: with its end.
        place: index of the step's cell.
        num_cells: of a whole line.
    """
    cells = line.rstrip(b"\r\n").split(b",")  # numbers, none of which is quoted
    if len(cells) != num_cells or not line.endswith(b"\n"):
        return None
    try:
        step = float(cells[place])
    except ValueError:
        return None
    return step if math.isfinite(step) else None


def widen_file(path: Path, columns: Sequence[str], new: Sequence[str]) -> None:
    """Replaces a file by one with more columns, empty so far; makes one that is not there."""
    lines: list[bytes] = []
    if columns:
        lines = path.read_bytes().splitlines()[1:]
    with atomic_file(path) as file:
        file.write(csv_line([*columns, *new]))
        for line in lines:
            file.write(line + b"," * len(new) + b"\n")


def csv_line(cells: Iterable[Any]) -> bytes:
    """A line with its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
