"""Files by which the ranks of a run see that the others live, and agree to end: `run_dir/heartbeats`.

Files, for they show a rank that is stopped, whose torch store or socket would only keep others waiting. A rank reads
one other rank's file and the verdict, so that a run of many ranks asks little of the file system they share. No clock
is compared with another: a file that changes is a rank that lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrl.io.processes import machine, started_at

FOLDER = "heartbeats"
VERDICT = "ended.json"


@dataclass(frozen=True)
class Beat:
    """What a rank wrote last."""

    run: str
    """Name that the ranks of one start of a run share; files of another start count for nothing."""
    rank: int
    host: str
    machine: str
    """On which `pid` is a process of this rank."""
    pid: int
    started_at: float | None
    """Of the process, by which it is told from a later one with its id."""
    phase: str
    sample: str
    for_s: float
    """Seconds for which nothing has been done."""
    count: int
    """Of this rank's beats."""

    @property
    def doing(self) -> str:
        """Phase and sample in words."""
        return f"{self.phase}, row {self.sample!r}" if self.sample else self.phase


@dataclass(frozen=True)
class Verdict:
    """Why a run ends on all ranks."""

    run: str
    rank: int
    message: str
    exit_code: int


class Heartbeats:
    """The files of one rank.

    Args:
        run_dir: folder of the run, which all ranks see.
        run: see `Beat.run`.
        rank: this one.
        world_size: of the run; rank r looks at rank r + 1.
    """

    def __init__(self, run_dir: str | Path, run: str, rank: int, world_size: int) -> None:
        self.folder = Path(run_dir, FOLDER)
        self.run, self.rank, self.world_size = run, rank, world_size
        self.path = self.folder / f"rank{rank}.json"
        self._count = 0
        self._started_at = started_at(os.getpid())
        self._host = socket.gethostname()
        self._machine = machine()

    def write(self, phase: str, sample: str, for_s: float) -> None:
        """Says that this rank lives. A full disk does not end a run here: the time of the file says it, too."""
        self._count += 1
        beat = Beat(
            run=self.run,
            rank=self.rank,
            host=self._host,
            machine=self._machine,
            pid=os.getpid(),
            started_at=self._started_at,
            phase=phase,
            sample=sample,
            for_s=round(for_s, 1),
            count=self._count,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.path, asdict(beat))
        except OSError:
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def neighbour(self) -> tuple[Beat, int] | None:
        """The last beat of the rank that this one looks at, and the time of its file; None where there is none."""
        path = self.folder / f"rank{(self.rank + 1) % self.world_size}.json"
        values = _read(path)
        if values is None or values.get("run") != self.run:
            return None
        try:
            return Beat(**values), path.stat().st_mtime_ns
        except (OSError, TypeError):
            return None

    def end_all(self, message: str, exit_code: int) -> None:
        """Has all other ranks end; the first to say so counts."""
        verdict = Verdict(self.run, self.rank, message, exit_code)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.verdict() is None:
                _replace(self.folder / VERDICT, asdict(verdict))

    def verdict(self) -> Verdict | None:
        """Why the run ends, if a rank has said so."""
        values = _read(self.folder / VERDICT)
        if values is None or values.get("run") != self.run:
            return None
        with contextlib.suppress(TypeError):
            return Verdict(**values)
        return None

    def is_here(self, beat: Beat) -> bool:
        """True if a rank's process is on this machine, and still the one that wrote the beat."""
        return self._knows(beat) and started_at(beat.pid) == beat.started_at

    def is_gone(self, beat: Beat) -> bool:
        """True if a rank's process was on this machine, and is there no more."""
        return self._knows(beat) and started_at(beat.pid) != beat.started_at

    def _knows(self, beat: Beat) -> bool:
        return beat.machine == self._machine and beat.started_at is not None

    def close(self) -> None:
        """Removes this rank's file, so that nobody waits for it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last one takes the folder along, unless a verdict is in it
            self.folder.rmdir()


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Writes a file that is read whole. No fsync: what a power cut takes says nothing any more."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values))
    partial.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
