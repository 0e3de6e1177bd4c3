"""`read_rows`: a source of records as checked rows, for scripts; a run reads its own by `LongVideoReason`."""

from __future__ import annotations

from pathlib import Path

from longrl.datamodules.rows.published import canonical_row
from longrl.datamodules.rows.question_rows import ROW_ARGUMENTS, RowFunction, make_rows
from longrl.datamodules.rows.sources import media_root_of, read_records
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.types import Row


def read_rows(
    source: str | Path,
    row_function: FunctionOrPath[RowFunction] = canonical_row,
    media_root: str | None = None,
) -> list[Row]:
    """Reads every record of a file or hub data set as a checked `Row`.

    Args:
        source: a file or a hub id, as `data.train` takes it (`longrl.datamodules.rows.sources.read_records`).
        row_function: turns a record into a row or several, as `data.row_function` does: a function, its import path, or
            `file.py:function`.
        media_root: folder where relative media paths start; by default that of the source, if it is a file.

    Raises:
        ValueError: a record cannot be used; the message says which one and why.
    """
    function = resolve_function(row_function, "row_function", ROW_ARGUMENTS)
    rows: list[Row] = []
    for made in make_rows(read_records(source), function, media_root or media_root_of(source)):
        if isinstance(made, ValueError):
            raise made
        rows.append(made)
    return rows
