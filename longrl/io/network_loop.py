"""The thread in which a process waits for many answers at once, without a thread for each."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class NetworkLoop:
    """An event loop in a thread of its own, for as long as the process lives."""

    def __init__(self) -> None:
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
