"""Seconds that a prompt's media took to read and decode, measured where they are decoded."""

from __future__ import annotations

import time
from collections.abc import Iterable

from longrl.types import AudioClip, Frames, ReadingTime


class ReadingClock:
    """Remembers what each medium took, since a worker holds some of them for the next question about them."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        """Of all that was decoded so far."""
        self._seconds: dict[str, float] = {}

    def decoded(self, key: str, start: float) -> None:
        """Notes that a medium's pixels or samples are there, `time.perf_counter` having been `start` before."""
        seconds = time.perf_counter() - start
        self._seconds[key] = seconds
        self.spent_s += seconds

    def of(self, media: Iterable[Frames | AudioClip], spent_before: float) -> ReadingTime:
        """What a prompt's media took.

        Args:
            media: all of the prompt.
            spent_before: `spent_s` before they were read.
        """
        known = [self._seconds.get(item.key) for item in media]
        alone = None if None in known else sum(seconds for seconds in known if seconds is not None)
        return ReadingTime(self.spent_s - spent_before, alone)
