"""Where a training step's seconds go: encode, generate, reward, update."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class PhaseTimes:
    """Seconds per phase since the last `collect`.

    Example:
        with times("generate"):
            ...
        times.collect()  # {"generate": 1.3}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """The seconds of each phase; the next step starts at zero."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
