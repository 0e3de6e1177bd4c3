"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def make_table(head: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None) -> Table:
    """A table of rich with its rows, each value as `str` shows it."""
    from rich.table import Table

    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    return table
