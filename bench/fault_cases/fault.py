"""A fault: what is done to a run, and what the documentation promises then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a fault led to.

    Args:
        seen: the line that a user reads, or what was found.
        exit_code: of the command; minus the signal's number if a signal ended it.
        kept: what is there afterwards, in words.
        lost_steps: optimizer steps that were done and have to be done again.
    """

    seen: str
    exit_code: int
    kept: str
    lost_steps: int = 0


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        kind: signals, ranks, disk, checkpoints, records, media, rewards, judges, engines, servers, caches, ...
        fault: what goes wrong, in words.
        does: makes it go wrong in an empty folder.
        exit_code: the documented one, or several.
        seen: a regular expression that the line a user reads has to match.
        lost_steps: at most so many.
        limit_s: the command ends within so many seconds; a bound against waiting for ever, not a measurement.
        quick: runs in continuous integration, too: it takes some seconds.
    """

    kind: str
    fault: str
    does: Callable[[Path], Outcome]
    exit_code: int | tuple[int, ...]
    seen: str
    lost_steps: int = 0
    limit_s: float = 180.0
    quick: bool = True


def try_out(fault: Fault, folder: Path) -> dict[str, int | float | str | bool]:
    """The row of a fault: what was seen, and whether that is what the documentation says."""
    started = time.monotonic()
    outcome = fault.does(folder)
    ended_s = time.monotonic() - started
    documented = fault.exit_code if isinstance(fault.exit_code, tuple) else (fault.exit_code,)
    as_documented = (
        outcome.exit_code in documented
        and re.search(fault.seen, outcome.seen) is not None
        and outcome.lost_steps <= fault.lost_steps
        and ended_s <= fault.limit_s
    )
    return {
        "kind": fault.kind,
        "fault": fault.fault,
        "seen": outcome.seen,
        "exit_code": outcome.exit_code,
        "lost_steps": outcome.lost_steps,
        "ended_s": round(ended_s, 1),
        "kept": outcome.kept,
        "as_documented": as_documented,
    }
