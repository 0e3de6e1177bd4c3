"""How much memory each phase of a training step takes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from longrl.types import Metrics

GIB = 1 << 30
STATM = Path("/proc/self/statm")


class PhaseMemory:
    """GiB by phase: on a GPU the most that tensors took during it, else what the process holds at its end.

    Example:
        memory.begin()
        ...
        memory.end("update")
        memory.collect()  # {"update": 61.3}
    """

    def __init__(self) -> None:
        self._peaks: Metrics = {}

    def begin(self) -> None:
        """A phase begins; phases do not lie within each other."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def end(self, phase: str) -> None:
        """It ends; one that comes several times in a step has its largest value."""
        is_gpu = torch.cuda.is_initialized()
        size = torch.cuda.max_memory_allocated() if is_gpu else resident_bytes()
        before = self._peaks.get(phase, 0.0)
        self._peaks[phase] = max(before, size / GIB)

    def collect(self) -> Metrics:
        """The values of each phase; the next step starts anew."""
        peaks = dict(self._peaks)
        self._peaks.clear()
        return peaks


def resident_bytes() -> int:
    """Memory that this process holds now; without /proc the most it ever held."""
    if STATM.exists():
        pages = int(STATM.read_text().split()[1])
        return pages * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
