"""Signals that ask a command to end: what is said, how soon it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from longrl.io.exit_codes import INTERRUPTED, STOPPED

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""SIGUSR1 is SLURM's warning that a job's time is nearly over."""
REPEAT_S = 1.0
"""One Ctrl-C may arrive twice, from the terminal and from a launcher: a second one comes later than that."""
POKE_S = 0.5
"""The main thread is woken again after so long: a signal that came just before it began to wait did not end that."""
GRACE_S = 10.0
"""How long a command that does not train may take to end in good order."""
SHOW_CURSOR = "\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread of a command that a signal ends."""


class StopRun(SystemExit):
    """Ends a training run that was asked to stop, on all ranks at one point, after its checkpoint.

    Args:
        step: optimizer steps taken.
        code: of the process.
        reason: what ended it, where that is no signal.
    """

    def __init__(self, step: int, code: int = STOPPED, reason: str = "") -> None:
        super().__init__(code)
        self.step = step
        self.reason = reason


class StopSignals:
    """Notes signals while its `with` block runs, whatever the main thread is doing.

    A command is interrupted by the first one: `Interrupted` is raised in the main thread, and the process ends after
    `GRACE_S` at the latest. Once `defer` was called, a training run ends at a point of its own, by `requested`. A
    second Ctrl-C ends the process at once.

    A thread reads the signals: Python's own handlers wait for calls into C, which may be a collective that never ends.

    Args:
        speaks: this process tells the user what happens; other ranks of the run are silent.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.requested: signal.Signals | None = None
        """The first signal that asked to end."""
        self.notice = ""
        """What a run that is to end says of it, for a screen that would draw over the line."""
        self.children: Callable[[], Sequence[subprocess.Popen[Any]]] = tuple
        """Gives the ranks that this process started: they end with it."""
        self.is_launched = False
        """Another process started this rank, and ends with the exit code of the run."""
        self.advice: Callable[[], str] = str
        """Says, of a run, what there is and how to go on."""
        self._deferred = False
        self._limit_s: float | None = None
        self._deadline: float | None = None
        self._is_noted = False
        self._is_told = False
        self._is_closing = False
        self._has_raised = False
        self._interrupted_at: float | None = None
        self._before: dict[int, Any] = {}
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)

    # -- the block -----------------------------------------------------------------------------------------------

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self.handle()
        _ACTIVE.append(self)
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing = True
        _ACTIVE.remove(self)
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._mouth.close()  # which ends the thread

    def handle(self) -> None:
        """Takes the signals, also from a library that has taken them since."""
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and self._before.get(number) == signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            signal.signal(number, self._on_signal)

    def defer(self, limit_s: float | None = None) -> None:
        """From now on a signal only sets `requested`, for the run to end at a point of its own.

        Args:
            limit_s: seconds after a signal in which it must have ended; else the process ends where it is.
        """
        self._limit_s = limit_s
        # A signal that an earlier part of the command has swallowed counts for the run.
        self._deadline = None if limit_s is None or not self._is_noted else time.monotonic() + limit_s
        self._deferred = True
        self.handle()

    def interrupt(self) -> None:
        """From now on a signal interrupts the command again."""
        self._deferred = False
        self.advice = str
        self.children = tuple

    @property
    def is_deferred(self) -> bool:
        """True from `defer` to `interrupt`."""
        return self._deferred

    @property
    def code(self) -> int:
        """Exit code of a command that the signal interrupted: as a shell has it of one that the signal ended."""
        return INTERRUPTED if self.requested is None else 128 + self.requested

    def tell(self, text: str) -> None:
        """Says once how the command ended; what encloses it has nothing to add."""
        if not self._is_told:
            self._is_told = True
            self.say(text)

    def say(self, text: str) -> None:
        """One line for the user, also where the standard streams are held by a thread that hangs."""
        if self.speaks:
            with contextlib.suppress(OSError):
                os.write(2, f"longrl: {text}\n".encode())

    # -- signals -------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number)
        # Once: what cleans up is not interrupted, and the thread ends what does not come to an end.
        if not (self._has_raised or self._deferred or self._is_closing):
            self._has_raised = True
            raise Interrupted

    def _listen(self) -> None:
        while True:
            left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            is_waiting = self._is_noted and not (self._has_raised or self._deferred or self._is_closing)
            ready, _, _ = select.select([self._ears], [], [], POKE_S if is_waiting else left)
            if not ready:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._give_up()
                if is_waiting:
                    self._wake_main_thread()
                continue
            numbers = self._ears.recv(64)
            if not numbers:
                self._ears.close()
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._note(signal.Signals(number))

    def _wake_main_thread(self) -> None:
        """Ends what the main thread waits for, so that it handles the signal that it has got.

        By another signal than Ctrl-C's, of which a second one would end the process at once.
        """
        main_thread = threading.main_thread().ident
        if main_thread is not None:
            signal.pthread_kill(main_thread, signal.SIGTERM)

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None and number == signal.SIGINT and now - self._interrupted_at >= REPEAT_S:
            self._end(INTERRUPTED, f"a second Ctrl-C: ended at once{self._advised()}")
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = now
        self.requested = self.requested or number
        if self._is_noted:
            return
        self._is_noted = True
        if self._deferred:
            self.notice = f"{number.name}: the run stops after this step, with a checkpoint (a second Ctrl-C: at once)"
            self.say(self.notice)
        limit_s = self._limit_s if self._deferred else GRACE_S
        if limit_s is not None:
            self._deadline = now + limit_s

    def _give_up(self) -> None:
        if not self._deferred:
            self._end(self.code, f"interrupted; it did not end within {GRACE_S:g} s by itself")
        code = 0 if self.is_launched else STOPPED
        why = f"the step did not end within checkpoint.stop_within_s={self._limit_s:g} and is abandoned"
        self._end(code, f"{why}{self._advised()}")

    def _advised(self) -> str:
        advice = self.advice()
        return f"; {advice}" if advice else ""

    def _end(self, code: int, text: str) -> None:
        self.say(text + (SHOW_CURSOR if sys.stderr.isatty() else ""))
        for child in self.children():
            child.kill()
        os._exit(code)

    # -- forks ---------------------------------------------------------------------------------------------------

    def leave_child(self) -> None:
        """In a forked child, a loader worker say: what is meant for the run does not end its worker before it."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        self._mouth.close()
        self._ears.close()
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)  # `timeout` and a shell send SIGTERM to the whole group


_ACTIVE: list[StopSignals] = []


def current_signals() -> StopSignals | None:
    """Those of the command that runs."""
    return _ACTIVE[-1] if _ACTIVE else None


def is_asked_to_stop() -> bool:
    """True in a training run once a signal has reached this process."""
    signals = current_signals()
    return signals is not None and signals.is_deferred and signals.requested is not None


@contextlib.contextmanager
def stop_signals(speaks: bool = True) -> Iterator[StopSignals | None]:
    """Those of the command that runs, or new ones; None outside the main thread, where Python handles no signals."""
    found = current_signals()
    if found is not None or threading.current_thread() is not threading.main_thread():
        yield found
        return
    with StopSignals(speaks) as signals:
        yield signals


@contextlib.contextmanager
def interruptible(command: str, kept: str = "") -> Iterator[None]:
    """Has a command end with one line and a code of its own once a signal interrupts it.

    Args:
        command: as the user types it.
        kept: what is kept of its work, and how to go on.

    Raises:
        SystemExit: a signal interrupted the block.
    """
    with stop_signals() as signals:
        try:
            yield
        except StopRun:
            raise
        except BaseException as error:
            # Libraries make errors and exits of their own of an interrupt.
            if signals is None or signals.requested is None:
                raise
            signals.tell(f"{signals.requested.name}: `{command}` is interrupted{kept and f'; {kept}'}")
            raise SystemExit(signals.code) from error


def ignore_signals() -> None:
    """The process is about to end with a code that no further signal is to change."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_child() -> None:
    while _ACTIVE:
        _ACTIVE.pop().leave_child()


os.register_at_fork(after_in_child=_leave_child)
