"""Replies of servers that need not mean well: read until they are too large or take too long, then let go of."""

from __future__ import annotations

import time
import zlib

import httpx

MAX_REPLY_BYTES = 16 << 20
"""Limit of a reply, unpacked."""
ACCEPT = {"Accept-Encoding": "gzip, identity"}
"""What can be unpacked bit by bit, and so does no harm."""
NO_MORE = ("content-encoding", "content-length", "transfer-encoding")
"""Headers that say nothing of a body that was unpacked."""
TO_GZIP_OR_ZLIB = 47
"""Of zlib: window bits of 15, and a header of either kind."""


class ReplyRefused(httpx.TransportError):
    """A reply that is too large, or packed in a way that was not asked for."""


class ReplyBody:
    """The body of a reply as it comes in.

    Args:
        response: whose headers have come.
        max_bytes: limit of the body, unpacked.
    """

    def __init__(self, response: httpx.Response, max_bytes: int = MAX_REPLY_BYTES) -> None:
        self.response = response
        self.max_bytes = max_bytes
        self.content = bytearray()
        packing = response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("identity", "gzip", "deflate", ""):
            raise ReplyRefused(f"its reply is packed by {packing[:40]!r}, which was not asked for")
        self._unpacker = zlib.decompressobj(TO_GZIP_OR_ZLIB) if packing in ("gzip", "deflate") else None

    def add(self, chunk: bytes) -> None:
        """Takes what came next, as it was sent.

        Raises:
            ReplyRefused: it is too much, or cannot be unpacked.
        """
        room = self.max_bytes - len(self.content) + 1
        if self._unpacker is None:
            self.content += chunk[:room]
        else:
            try:
                self.content += self._unpacker.decompress(chunk, room)
            except zlib.error as error:
                raise ReplyRefused(f"its reply cannot be unpacked ({error})") from error
        if len(self.content) > self.max_bytes:
            raise ReplyRefused(
                f"its reply is larger than {self.max_bytes / (1 << 20):g} MiB, and was not read to its end"
            )

    def reply(self) -> httpx.Response:
        """The reply with all of its body."""
        headers = [(name, value) for name, value in self.response.headers.multi_items() if name.lower() not in NO_MORE]
        return httpx.Response(self.response.status_code, headers=headers, content=bytes(self.content))


def read_body(response: httpx.Response, timeout_s: float, max_bytes: int = MAX_REPLY_BYTES) -> httpx.Response:
    """A reply that is being streamed, with its body.

    Args:
        response: see `httpx.Client.stream`.
        timeout_s: in which all of it must have come, for httpx's own limit is one of each piece.
        max_bytes: limit of its body.

    Raises:
        httpx.ReadTimeout: it took longer.
        ReplyRefused: it is too large.
    """
    deadline = time.monotonic() + timeout_s
    body = ReplyBody(response, max_bytes)
    for chunk in response.iter_raw():
        body.add(chunk)
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout(f"the reply was still coming in after {timeout_s:g} s")
    return body.reply()


async def read_body_async(response: httpx.Response, max_bytes: int = MAX_REPLY_BYTES) -> httpx.Response:
    """As `read_body`, without a limit of time: `asyncio.timeout` is one."""
    body = ReplyBody(response, max_bytes)
    async for chunk in response.aiter_raw():
        body.add(chunk)
    return body.reply()
