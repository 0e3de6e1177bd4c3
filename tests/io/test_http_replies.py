"""Replies that are too large, packed or slow, without a socket."""

import asyncio
import gzip
import time
import zlib

import httpx
import pytest

from longrl.io.http_replies import ACCEPT, ReplyRefused, read_body, read_body_async

LIMIT = 1000


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces, and how many of them were read."""

    def __init__(self, pieces, pause_s=0.0):
        self.pieces, self.pause_s, self.num_read = pieces, pause_s, 0

    def __iter__(self):
        for piece in self.pieces:
            self.num_read += 1
            time.sleep(self.pause_s)
            yield piece

    async def __aiter__(self):
        for piece in self:
            yield piece


def read(stream, timeout_s=60.0, **headers):
    def answer(request):
        assert request.headers["accept-encoding"] == "gzip, identity"
        return httpx.Response(200, headers={"X-Kept": "1", **headers}, stream=stream)

    with (
        httpx.Client(transport=httpx.MockTransport(answer), headers=ACCEPT) as client,
        client.stream("GET", "http://server") as response,
    ):
        return read_body(response, timeout_s, LIMIT)


def read_async(stream, **headers):
    async def main():
        transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, stream=stream))
        async with httpx.AsyncClient(transport=transport) as client, client.stream("GET", "http://server") as response:
            return await read_body_async(response, LIMIT)

    return asyncio.run(main())


@pytest.mark.parametrize("pack", [None, gzip.compress, zlib.compress])
def test_a_reply_is_the_same_packed_or_not(pack):
    body = b'{"text": "' + bytes(range(97, 122)) * 30 + b'"}'
    headers = {"Content-Encoding": "gzip" if pack is gzip.compress else "deflate"} if pack else {}
    sent = pack(body) if pack else body
    pieces = [sent[start : start + 7] for start in range(0, len(sent), 7)]
    for reply in (read(Pieces(pieces), **headers), read_async(Pieces(pieces), **headers)):
        assert reply.content == body
        assert reply.json()["text"].startswith("abc")
        assert "content-encoding" not in reply.headers
    assert read(Pieces([body])).headers["x-kept"] == "1"


def test_exactly_the_limit_is_allowed_and_a_byte_more_is_not():
    assert len(read(Pieces([b"x" * 600, b"x" * 400])).content) == LIMIT
    with pytest.raises(ReplyRefused, match="larger than"):
        read(Pieces([b"x" * 600, b"x" * 401]))


def test_of_an_endless_reply_no_more_is_read():
    stream = Pieces(b"x" * 100 for _ in range(10**9))
    with pytest.raises(ReplyRefused, match="larger than"):
        read(stream)
    assert stream.num_read == 11


@pytest.mark.parametrize("reader", [read, read_async])
def test_a_bomb_is_not_unpacked(reader):
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(ReplyRefused, match="larger than"):
        reader(Pieces([bomb]), **{"Content-Encoding": "gzip"})


def test_a_packing_that_was_not_asked_for_or_is_none_is_refused():
    with pytest.raises(ReplyRefused, match="packed by 'br'"):
        read(Pieces([b"x"]), **{"Content-Encoding": "br"})
    with pytest.raises(ReplyRefused, match="cannot be unpacked"):
        read(Pieces([b"no gzip at all"]), **{"Content-Encoding": "gzip"})


def test_a_reply_that_drips_is_given_up():
    stream = Pieces((b"x" for _ in range(500)), pause_s=0.01)
    with pytest.raises(httpx.ReadTimeout, match="still coming in after 0.05 s"):
        read(stream, timeout_s=0.05)
    assert stream.num_read < 100
