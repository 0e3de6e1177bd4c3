"""The thread in which a process waits for many answers at once, without a thread for each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

MAX_CONNECTIONS = 1 << 16
"""What is waited for at once may have that many connections, if the system lets it."""


class NetworkLoop:
    """An event loop in a thread of its own, for as long as the process lives."""

    def __init__(self) -> None:
        allow_connections()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="network", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Begins it; to cancel the result is to cancel the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Waits for its result; another thread's work goes on meanwhile, and an interrupt ends it."""
        result = self.submit(work)
        try:
            return result.result()
        except BaseException:
            result.cancel()
            raise


def network_loop() -> NetworkLoop:
    """That of this process."""
    return _loop_of(os.getpid())


@functools.lru_cache(maxsize=1)  # a fork has the loop, but not its thread
def _loop_of(process: int) -> NetworkLoop:
    return NetworkLoop()


def allow_connections() -> None:
    """Raises the process's own limit of open files, often 1024: a server would look lost to the next connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, MAX_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
