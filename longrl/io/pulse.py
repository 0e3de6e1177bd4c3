"""What this process is doing: written by whoever does it, read by a watchdog that says where a run stands still."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Pulse:
    """The phase a process is in. Its fields are set where the work is done, for a call would cost more than they do."""

    phase: str = "start"
    """start, data, encode, sync, generate, decode, reward, update, validate, save; `step` lies between them."""
    since: float = 0.0
    """When a phase of a step began (`time.perf_counter`)."""
    sample: str = ""
    """Id of the row that is worked on; "" where it is none alone."""
    beats: int = 0
    """Grows with whatever gets done: phases that begin and end, rows, micro-batches, decoded tokens."""
    workers: dict[int, str] = field(default_factory=dict)
    """Process id of each loader worker that must be alive now -> its name, for people."""

    def enter(self, phase: str) -> None:
        """Begins a phase that ends with the next one."""
        self.phase = phase
        self.sample = ""
        self.beats += 1


PULSE = Pulse()
"""Of this process; a rank of a run is one."""
