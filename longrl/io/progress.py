"""How far commands are: the bar of those that work through items, and times for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SPEED_OF_S = 24 * 3600.0
"""Seconds whose mean is the speed of a bar: with rich's 30 s, items that take longer have no speed and no time left."""


def item_progress(console: Console | None = None) -> Progress:
    """A bar with the number of items, the time that went by and what is left, for a `with` statement."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=SPEED_OF_S)


def duration(seconds: float) -> str:
    """How long something took, or will take: "8.2 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days >= 2:
        return f"{days} d {hours_left} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
