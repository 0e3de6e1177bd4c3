"""Processes that must not outlive a run: they end with their parent, and a run that is ended takes all of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
from pathlib import Path

from longrl.io.pulse import PULSE

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2)."""
ENDED = ("zombie", "dead")
"""States of a process, as psutil calls them, that only waits for whoever started it to ask how it ended."""


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it ends, if it is a rank that another one started.

    SIGKILL, for a rank that waits for others in a collective looks at no other signal, and one that is stopped at none.
    Does nothing outside Linux, and in a process that a shell or a batch system started: it may outlive those.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_descendants() -> None:
    """Ends all processes that this one started, and theirs: workers, ranks, servers, whatever state they are in."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def machine() -> str:
    """Within what a process id means one process: a host from one start of its system to the next, or a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started_at(pid: int) -> float | None:
    """When a process was started, which tells it from a later one of its id; None of one that ended.

    On Linux by no clock that somebody may set: in ticks since the system's start.
    """
    if sys.platform == "linux":
        try:
            state, *numbers = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else float(numbers[18])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() in ENDED else process.create_time()
    except psutil.Error:
        return None


def trouble_of(pid: int) -> str | None:
    """Why a child process can do no more: it is `dead`, or `stopped` by a signal; None where it can.

    A dead one is not reaped here: whoever started it may want to know how it ended.
    """
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "dead"
    if status in ENDED:
        return "dead"
    return "stopped" if status == psutil.STATUS_STOPPED else None


# ---- workers of a loader ----

TORCH_SAYS = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+)")
HINTS = {
    "dead": (
        "the kernel kills one where memory runs out (dmesg says so): lower data.num_workers, data.prefetch_prompts or "
        "data.max_held_mib"
    ),
    "out of shared memory": (
        "another process filled /dev/shm meanwhile; enlarge it (docker run --shm-size=16g or --ipc=host), or set "
        "data.num_workers=0, which needs none"
    ),
    "stopped": "a signal has stopped it (SIGSTOP, a debugger)",
}


class LostWorker(RuntimeError):
    """A loader worker that died; it ends the run, whatever was being done."""


def lost_worker_message(name: str, pid: int, kind: str) -> str:
    """What is said of a loader worker that is `dead`, `stopped` or `out of shared memory`."""
    return f"{name} (pid {pid}) is {kind}: {HINTS[kind]}"


def lost_worker_in(error: BaseException | None) -> str | None:
    """What an error says of a loader worker that died, also where another error was raised in its place.

    PyTorch raises it within a handler of SIGCHLD: in whatever the main thread is doing.
    """
    while error is not None:
        if isinstance(error, LostWorker):
            return str(error)
        found = TORCH_SAYS.match(str(error)) if isinstance(error, RuntimeError) else None
        if found:
            pid = int(found[1])
            name = PULSE.workers.get(pid, "a loader worker")
            first_line = str(error).splitlines()[0].strip()
            kind = "out of shared memory" if "Bus error" in first_line else "dead"  # a page that found no room
            return f"{lost_worker_message(name, pid, kind)} (PyTorch: {first_line})"
        error = error.__cause__ or error.__context__
    return None
