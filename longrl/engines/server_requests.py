"""Requests that a rollout server is answering: whose they are, and what becomes of those whose trainer hangs up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from fastapi import Request, Response

HUNG_UP = 499
"""Status of an answer that nobody reads, as web servers have it in their logs."""


class RunningRequests:
    """The requests that the engine is answering."""

    def __init__(self) -> None:
        self._senders: dict[str, str] = {}
        self.num_completions = 0
        """That are being sampled, or wait for it."""

    @contextlib.contextmanager
    def noted(self, request_id: str, sender: str, num_completions: int) -> Iterator[None]:
        """Counts a request as running inside."""
        self._senders[request_id] = sender
        self.num_completions += num_completions
        try:
            yield
        finally:
            del self._senders[request_id]
            self.num_completions -= num_completions

    def ids_of(self, sender: str) -> list[str]:
        """Of the requests of a sender."""
        return [request_id for request_id, other in self._senders.items() if other == sender]


async def unless_hung_up(answer: Coroutine[Any, Any, Response], request: Request) -> Response:
    """The answer, which is given up once the other side has closed the connection; the body must have been read."""
    answering = asyncio.ensure_future(answer)
    listening = asyncio.ensure_future(_hang_up(request))
    await asyncio.wait([answering, listening], return_when=asyncio.FIRST_COMPLETED)
    listening.cancel()
    if answering.done():
        return answering.result()
    answering.cancel()
    return Response(status_code=HUNG_UP)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
