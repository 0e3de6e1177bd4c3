"""How far `validate`, `test` and `predict` are: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from rich.console import Console

from longrl.evaluation.screen import number
from longrl.io.progress import duration, item_progress

LINE_EVERY_S = 30.0
"""Between two lines of a log."""


class EvaluationBar:
    """Batches done of all, seconds of one, and the time left.

    Args:
        name: of what is done, such as `test`.
        total: batches; None where nobody knows.
        is_live: draws a bar, which stays where it was when all is done; else lines are written.
        write: takes a line.
        console: where the bar is drawn; None is the standard output.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        is_live: bool,
        write: Callable[[str], None],
        console: Console | None = None,
    ) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._write = write
        self._start = self._last_line = time.perf_counter()
        self._bar = item_progress(console) if is_live else None
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)
            self._bar.start()

    def advance(self) -> None:
        """One batch more."""
        self.done += 1
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self.done == 1 or now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._write(self.line())

    def line(self) -> str:
        """Where it is, as `test batch 3/40 | 2.1 s/batch | ETA 1 min 18 s`."""
        seconds = (time.perf_counter() - self._start) / max(self.done, 1)
        counted = f"{self.name} batch {self.done}" + (f"/{self.total}" if self.total else "")
        parts = [counted, f"{number(seconds)} s/batch"]
        if self.total:
            parts.append(f"ETA {duration(seconds * max(0, self.total - self.done))}")
        return " | ".join(parts)

    def stop(self, metrics: Mapping[str, float] | None = None) -> None:
        """Takes the bar away, and says what was measured and how long it took."""
        if self._bar is not None:
            self._bar.stop()
        seconds = duration(time.perf_counter() - self._start)
        batches = "1 batch" if self.done == 1 else f"{self.done} batches"
        self._write(metrics_line(f"{self.name}: {batches} in {seconds}", metrics or {}))


def metrics_line(start: str, metrics: Mapping[str, float]) -> str:
    """A line with the metrics behind it, those of parts left out: `val/accuracy`, not `val/accuracy/spatial`."""
    known = {name: value for name, value in metrics.items() if name.count("/") == 1 and math.isfinite(value)}
    return " | ".join([start, *(f"{name} {number(value)}" for name, value in sorted(known.items()))])


def batch_count(batches: list[int | float] | int | float) -> int | None:
    """Batches of all loaders together, as Lightning counts them; None where a loader has no end."""
    counts = batches if isinstance(batches, list) else [batches]
    total = sum(counts)
    return int(total) if math.isfinite(total) else None
