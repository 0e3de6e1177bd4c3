"""Seconds, memory and spans of a training step's phases."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from longrl.io.pulse import PULSE
from longrl.modules.phase_memory import PhaseMemory
from longrl.modules.phase_spans import PhaseSpans
from longrl.types import Metrics


class PhaseTimes:
    """Seconds of a training step by phase: encode, sync, generate, reward, teacher, update, save.

    Example:
        with phases("generate"):
            ...
        phases.collect()  # {"generate": 1.3}
    """

    def __init__(self) -> None:
        self._seconds: Metrics = defaultdict(float)
        self.memory = PhaseMemory()
        self.spans = PhaseSpans()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to `phase`."""
        outer = PULSE.phase
        PULSE.phase = phase
        PULSE.beats += 1
        self.memory.begin()
        start = time.perf_counter()
        PULSE.since = start
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            stop = time.perf_counter()
            self._seconds[phase] += stop - start
            self.spans.add(phase, start, stop)
            PULSE.phase = outer
            PULSE.beats += 1
            self.memory.end(phase)

    def collect(self) -> Metrics:
        """The seconds of each phase; the next step starts at zero."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
