"""A limit on how long a call of somebody else's function may take."""

from __future__ import annotations

import functools
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

REPEAT_S = 1.0
"""The call is stopped again after so long: code that catches everything may have gone on."""


class TimeIsUp(BaseException):
    """Raised within a call that took too long; no Exception, so that `except Exception` lets it pass."""


@functools.cache
def _warn_of_no_limit() -> None:
    logger.warning(
        "rollout.reward.time_limit_s is not kept outside the main thread: Python handles signals there alone"
    )


def call_within(seconds: float, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a call, which is stopped once it has taken so long.

    The alarm is a signal, which Python handles in the main thread alone: it ends loops, sleeps, locks, sockets and
    regular expressions where they stand, and leaves no thread behind, as waiting for one would. What can't be stopped
    is a call into C that never looks for signals. Outside the main thread there is no limit, and neither with 0
    seconds.

    Raises:
        TimeIsUp: the time is over; its traceback tells where.
    """
    if not seconds:
        return function(*args, **kwargs)
    if threading.current_thread() is not threading.main_thread():
        _warn_of_no_limit()
        return function(*args, **kwargs)
    is_armed = True

    def stop(number: int, frame: FrameType | None) -> None:
        if is_armed:
            raise TimeIsUp

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    others_delay, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
    try:
        try:
            return function(*args, **kwargs)
        finally:
            is_armed = False  # at once: an alarm from here on would leave the next lines out
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)  # None: not written in Python
        if others_delay:  # an alarm that somebody had set before: it rings when it should, or now
            left = max(others_delay - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, others_interval)
