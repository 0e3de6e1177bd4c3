"""Tables on the terminal of answers that are right by degrees: R@k and mIoU of grounding, means of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longrl.evaluation.scores import Summary, percent
from longrl.io.tables import make_table

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH = 120
"""Columns of text that four measures with their intervals need."""


def graded_tables(name: str, summary: Summary) -> Iterator[Table]:
    """A table for each such task, in percent: a row for each category, strict, with `overall` also robust.

    Args:
        name: of the run or condition.
        summary: of its answers.
    """
    for task, measures in summary.graded.items():
        first = next(iter(measures.values()))
        rows = []
        for category, score in first.items():
            rows.append([category, *(percent(scores[category]) for scores in measures.values()), score.n])
        robust = summary.lenient_graded[task]
        whole = next(iter(first))
        rows.append([f"{whole}, robust", *(percent(scores[whole]) for scores in robust.values()), first[whole].n])
        yield make_table([f"{name}: {task}", *measures, "n"], rows)
