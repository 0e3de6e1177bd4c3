"""Seconds that a prompt's media took to read and decode, measured where they are decoded."""

from __future__ import annotations

import time
from collections.abc import Iterable

from longrl.types import AudioClip, Frames, ReadingTime


class ReadingClock:
    """Remembers what each medium took, since a worker holds some of them for the next question about them."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        """Of all that was decoded so far, and of choosing frames."""
        self.choosing_s = 0.0
        """Of choosing frames alone."""
        self._seconds: dict[str, float] = {}

    def decoded(self, start: float, *keys: str) -> None:
        """Notes that pixels or samples of media are there, `time.perf_counter` having been `start` before."""
        seconds = time.perf_counter() - start
        self._seconds |= dict.fromkeys(keys, seconds / max(1, len(keys)))
        self.spent_s += seconds

    def chose(self, start: float) -> None:
        """Notes that a selection has chosen the frames of a video, for which it may have decoded some."""
        seconds = time.perf_counter() - start
        self.choosing_s += seconds
        self.spent_s += seconds

    def mark(self) -> tuple[float, float]:
        """What `of` counts from."""
        return self.spent_s, self.choosing_s

    def of(self, media: Iterable[Frames | AudioClip], mark: tuple[float, float]) -> ReadingTime:
        """What a prompt's media took, and what choosing their frames did.

        Args:
            media: all of the prompt.
            mark: `mark` before they were read.
        """
        spent, chosen = self.spent_s - mark[0], self.choosing_s - mark[1]
        known = [self._seconds.get(item.key) for item in media]
        alone = None if None in known else sum(seconds for seconds in known if seconds is not None) + chosen
        return ReadingTime(spent, alone)
