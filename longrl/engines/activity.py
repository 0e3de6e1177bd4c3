"""How busy an engine was: the number of requests under way over time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_FOLLOWED = 1 << 16
"""Spans that are kept for a follower that does not read, the last ones."""


@dataclass(frozen=True)
class ActivitySpan:
    """A time in which the number of requests under way did not change."""

    start_s: float
    stop_s: float
    requests: int
    """0 is an idle engine."""


class EngineActivity:
    """The requests of an engine over time, as one thread notes them and another reads them.

    Args:
        clock: seconds; that of `PolicyModule.phases`.

    Example:
        activity.note(3)  # whenever the number changes
        busy_share(activity.take())
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._requests = 0
        self._spans: list[ActivitySpan] = []
        self._followers: list[deque[ActivitySpan]] = []

    def note(self, requests: int) -> None:
        """From now on so many are under way."""
        with self._lock:
            if requests != self._requests:
                self._close_span()
                self._requests = requests

    def take(self) -> list[ActivitySpan]:
        """The spans since the last call, up to now, without gaps."""
        with self._lock:
            self._close_span()
            spans = self._spans
            self._spans = []
        return spans

    def follow(self) -> Callable[[], list[ActivitySpan]]:
        """A further reader from now on: returns what `take` does, and leaves for others what it reads."""
        with self._lock:
            self._close_span()
            spans: deque[ActivitySpan] = deque(maxlen=MAX_FOLLOWED)
            self._followers.append(spans)

        def take() -> list[ActivitySpan]:
            with self._lock:
                self._close_span()
                taken = list(spans)
                spans.clear()
            return taken

        return take

    def _close_span(self) -> None:
        now = self._clock()
        if now > self._since:
            span = ActivitySpan(self._since, now, self._requests)
            for spans in (self._spans, *self._followers):
                spans.append(span)
        self._since = now


def busy_share(spans: Sequence[ActivitySpan]) -> float:
    """Share of the time in which a request was under way, 0 of no time."""
    total = sum(span.stop_s - span.start_s for span in spans)
    busy = sum(span.stop_s - span.start_s for span in spans if span.requests)
    return busy / total if total else 0.0


def mean_requests(spans: Sequence[ActivitySpan]) -> float:
    """Requests under way on average over time, 0 of no time."""
    total = sum(span.stop_s - span.start_s for span in spans)
    return sum((span.stop_s - span.start_s) * span.requests for span in spans) / total if total else 0.0
