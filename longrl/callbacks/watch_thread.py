"""The thread behind `Watchdog`: it looks at its own process and at another rank, and ends what stands still.

A thread, for it has the stacks of its process, and runs while the main thread waits in C, where no handler of a signal
does. What never lets go of the interpreter's lock keeps it from running, too: then the thread of `faulthandler`, which
is C, writes the stacks and ends the process; and other ranks miss the heartbeat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from longrl.io.exit_codes import HUNG, STOPPED
from longrl.io.heartbeats import Beat, Heartbeats
from longrl.io.processes import kill_descendants, lost_worker_message, trouble_of
from longrl.io.pulse import PULSE
from longrl.io.stop_signals import SHOW_CURSOR, is_asked_to_stop

TICK_S = 1.0
"""Seconds between two looks at this process."""
BEAT_S = 5.0
"""Seconds between two heartbeats, and two looks at another rank."""
SAY_S = 5.0
"""Seconds that the last words may take."""
WORKER_LOOKS = 3
"""Looks after which a loader worker is taken for lost: one that ends as it should is dead for a moment."""
STDERR = 2
FAILED = 1
"""Exit code of a rank that ends because another raised an error."""


@dataclass(frozen=True)
class Trouble:
    """Why a run must end."""

    message: str
    exit_code: int = HUNG
    found_by: int | None = None
    """The rank that told of it; None is this one."""
    victim: int | None = None
    """Process of this machine that cannot end by itself."""


@dataclass(frozen=True)
class WatchLimits:
    """Seconds after which something is taken for hung."""

    limit_of: Callable[[str], float]
    """Phase -> seconds in which it must get something done."""
    longest_s: float
    """Of all phases."""
    silent_s: float
    """Seconds without a heartbeat of a rank."""

    @property
    def tick_s(self) -> float:
        """As `TICK_S`, or less where the limits are small."""
        return min(TICK_S, self.longest_s / 20)

    @property
    def beat_s(self) -> float:
        """As `BEAT_S`, or less where the limits are small."""
        return min(BEAT_S, self.silent_s / 8)


class WatchThread(threading.Thread):
    """Looks until `stop` is called, or ends the process.

    Time is counted by looks, not by a clock: a process that was suspended as a whole has not hung meanwhile.

    Args:
        limits: see there.
        beats: the files of this rank.
        stacks: file for the stacks of all threads.
    """

    def __init__(self, limits: WatchLimits, beats: Heartbeats, stacks: Path) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.limits = limits
        self.beats = beats
        self.stacks = stacks
        self._stopping = threading.Event()
        self._seen = -1
        """`PULSE.beats` at the last look."""
        self._idle_s = 0.0
        """Seconds for which nothing has been done."""
        self._until_beat_s = 0.0
        self._heard: tuple[Beat, int] | None = None
        self._silent_s = 0.0
        """Seconds since the other rank's heartbeat changed."""
        self._lost: Counter[int] = Counter()
        """Loader worker -> looks in a row at which it was lost."""

    @override
    def start(self) -> None:
        """Begins to look. The first heartbeat does not wait: a rank may stop, or the lock be kept, before a look."""
        self._beat()
        super().start()

    @override
    def run(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(self.limits.tick_s):
            now = time.monotonic()
            seconds = min(now - last, 2 * self.limits.tick_s)
            last = now
            trouble = self.look(seconds)
            if trouble is not None and not self._stopping.is_set():
                self.end(trouble)

    def stop(self) -> None:
        """Ends the thread, and takes the heartbeat away."""
        self._stopping.set()
        if self.is_alive():
            self.join(SAY_S)
        faulthandler.cancel_dump_traceback_later()
        self.beats.close()

    # -- looking -------------------------------------------------------------------------------------------------

    def look(self, seconds: float) -> Trouble | None:
        """What is wrong after so many more seconds."""
        if self._seen == PULSE.beats:
            self._idle_s += seconds
        else:
            self._seen = PULSE.beats
            self._idle_s = 0.0
        self._until_beat_s -= seconds
        trouble = None
        if self._until_beat_s <= 0:
            self._beat()
            trouble = self._hear_others()
        return trouble or self._find_hung_phase() or self._find_lost_worker()

    def _beat(self) -> None:
        self._until_beat_s = self.limits.beat_s
        self._arm_last_gasp()
        self.beats.write(PULSE.phase, PULSE.sample, self._idle_s)

    def _arm_last_gasp(self) -> None:
        """Unless this is called again in time, the stacks are written to stderr and the process ends with status 1."""
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            faulthandler.dump_traceback_later(2 * self.limits.longest_s, file=STDERR, exit=True)

    def _find_hung_phase(self) -> Trouble | None:
        phase = PULSE.phase
        limit = self.limits.limit_of(phase)
        waits = waits_for_others()
        # Who only waits for another rank gives that one the time to say what it hangs in.
        allowed = limit + 4 * self.limits.beat_s if waits else limit
        if self._idle_s <= allowed:
            return None
        where = f"in the phase {phase}"
        if PULSE.sample:
            where += f", at row {PULSE.sample!r}"
        what = "has waited for other ranks" if waits else "has got nothing done"
        return Trouble(
            f"rank {self.beats.rank} {what} for {self._idle_s:.0f} s {where}, where {limit:g} s are allowed; if it "
            f"needs longer, raise watchdog.limit_s or give watchdog.limits_s a value for {phase!r}"
        )

    def _find_lost_worker(self) -> Trouble | None:
        if is_asked_to_stop():  # whoever asked may have asked the workers, too; the main thread meets their end
            return None
        workers = dict(PULSE.workers)
        for pid, name in workers.items():
            kind = trouble_of(pid)
            self._lost[pid] = self._lost[pid] + 1 if kind else 0
            if kind and self._lost[pid] >= WORKER_LOOKS:
                return Trouble(lost_worker_message(name, pid, kind))
        return None

    def _hear_others(self) -> Trouble | None:
        verdict = self.beats.verdict()
        if verdict is not None and verdict.rank != self.beats.rank:
            return Trouble(verdict.message, verdict.exit_code, verdict.rank)
        if self.beats.world_size == 1:
            return None
        heard = self.beats.neighbour()
        if heard is None:
            self._heard = None
            return None
        beat = heard[0]
        name = f"rank {beat.rank} (pid {beat.pid} on {beat.host})"
        doing = f"its last words: {beat.doing}"
        if self.beats.is_gone(beat):
            return Trouble(f"{name} has died without a word, as when memory runs out (dmesg says so); {doing}")
        if heard != self._heard:
            self._silent_s = 0.0
            self._heard = heard
        else:
            self._silent_s += self.limits.beat_s
            if self._silent_s > self.limits.silent_s:
                return self._give_up(beat, name, doing)
        return None

    def _give_up(self, beat: Beat, name: str, doing: str) -> Trouble:
        """What is said of a rank that is silent; it is killed if it is here."""
        message = f"{name} has given no sign of life for {self._silent_s:.0f} s: it is stopped, or its machine is gone"
        if not self.beats.is_here(beat):
            return Trouble(f"{message}; {doing}")
        return Trouble(f"{message}; {doing}. It is killed", victim=beat.pid)

    # -- ending --------------------------------------------------------------------------------------------------

    def end(self, trouble: Trouble) -> None:
        """Ends this process and all that it started, and has the other ranks end."""
        is_own = trouble.found_by is None
        if trouble.exit_code in (FAILED, STOPPED) and self._stopping.wait(2 * self.limits.beat_s):
            return  # the main thread has met the other rank's end by itself, and says what it knows
        written = self._write_stacks(trouble.message)
        ending = f"; the run ends with status {trouble.exit_code}"
        if written:
            ending += f", stacks of rank {self.beats.rank}: {written}"
        if is_own:
            self.beats.end_all(trouble.message, trouble.exit_code)
        if is_own or self.beats.rank == 0:
            if sys.stderr is not None and sys.stderr.isatty():
                ending += SHOW_CURSOR  # a live view has hidden it
            say(trouble.message + ending)
        self._let_others_end(trouble)
        # Not before: a launcher that sees a rank end kills rank 0, whose exit code is the command's.
        if trouble.victim is not None:
            with contextlib.suppress(OSError):
                os.kill(trouble.victim, signal.SIGKILL)
        kill_descendants()
        os._exit(trouble.exit_code)

    def _write_stacks(self, message: str) -> str:
        """Writes the stacks of all threads; returns the file, "" where it cannot be written."""
        with contextlib.suppress(OSError):
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w") as file:
                file.write(f"{message}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            return str(self.stacks)
        return ""

    def _let_others_end(self, trouble: Trouble) -> None:
        """Rank 0 ends first once all know, for its exit code is the command's; it takes what it started along."""
        beats = 0
        if trouble.found_by is None:
            beats += 2
        if self.beats.rank:
            beats += 2
        if self.beats.world_size > 1:
            time.sleep(beats * self.limits.beat_s)


def say(message: str) -> None:
    """One line on stderr, past the locks of streams and loggers; nobody waits long for a pipe that is full."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(STDERR, f"longrl: {message}\n".encode(errors="replace"))

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(SAY_S)


def waits_for_others() -> bool:
    """True if the main thread is in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
