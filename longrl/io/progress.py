"""How far commands are: the bar of those that work through items, and times for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def item_progress() -> Progress:
    """A bar with the number of items and the time that is left, for a `with` statement."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


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
