"""When a step's phases were, and when the engine had something to do: what a timeline is drawn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from longrl.engines.activity import ActivitySpan, EngineActivity

MAX_SPANS = 1 << 16
"""That are kept where nobody takes them, the last ones."""


@dataclass(frozen=True)
class PhaseSpan:
    """A time spent in one phase, on the clock of `PhaseTimes`."""

    start_s: float
    stop_s: float
    phase: str


@dataclass(frozen=True)
class TakenSpans:
    """What happened since spans were taken last."""

    phases: list[PhaseSpan] = field(default_factory=list)
    """In the order in which they ended; one within another comes before it."""
    rollouts: list[ActivitySpan] = field(default_factory=list)
    """Rollouts beside the update (`rollout.max_staleness: 1`)."""
    requests: list[ActivitySpan] | None = None
    """Requests under way over time; None if nobody counts them."""


class PhaseSpans:
    """Spans of the trainer's phases and of the engine's work since they were taken last.

    Example:
        spans.add("generate", 3.0, 4.5)
        spans.follow(activity)  # by whoever drives the engine, once
        spans.take().phases
    """

    def __init__(self) -> None:
        self.rollouts = EngineActivity()
        """Notes rollouts that go on beside the trainer."""
        self._phases: deque[PhaseSpan] = deque(maxlen=MAX_SPANS)
        self._requests: Callable[[], list[ActivitySpan]] | None = None

    def add(self, phase: str, start_s: float, stop_s: float) -> None:
        """A phase that has ended."""
        self._phases.append(PhaseSpan(start_s, stop_s, phase))

    def follow(self, activity: EngineActivity) -> None:
        """From now on the engine is busy where its driver says so, and there alone."""
        self._requests = activity.follow()

    def take(self) -> TakenSpans:
        """All of them; the next call begins anew."""
        requests = self._requests() if self._requests is not None else None
        taken = TakenSpans(list(self._phases), self.rollouts.take(), requests)
        self._phases.clear()
        return taken
