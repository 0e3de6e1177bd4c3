"""What stands before every route of a rollout server, vLLM's own included: the key, and a limit of the body's size."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from longrl.engines.server_key import KEY_VARIABLE

logger = logging.getLogger(__name__)

OPEN = ("/health",)
"""Paths that answer without a key: they tell nothing and change nothing."""
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


class ServerGuard:
    """ASGI middleware that lets requests through which bring the key, and say how long they are.

    Args:
        app: what it guards.
        key: as `Authorization: Bearer KEY` brings it.
        max_body_bytes: of one request; nothing of a larger one is read.
    """

    def __init__(self, app: App, key: str, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self._key = _digest(key)
        self._warned = False

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Hands a request on, or refuses it before its body is read."""
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refusal
            body = json.dumps({"error": {"message": text, "code": status}}).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and message of the answer to a request that goes no further."""
        headers = dict(scope["headers"])  # names in lower case; of two of a name the last counts
        method = scope.get("method", "GET")
        if scope["path"] in OPEN and (scope["type"], method) == ("http", "GET"):
            return None
        if not self._has_key(headers.get(b"authorization", b"")):
            self._warn(scope)
            return 401, f"the server wants its key: set {KEY_VARIABLE} to the same value for server and trainer"
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411, "a request must say its length (Content-Length)"
        if int(length.lstrip(b"0")[:20] or b"0") > self.max_body_bytes:
            return 413, f"a request may have {self.max_body_bytes} bytes; raise --max_request_gib of the server"
        return None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key).digest()
        return secrets.compare_digest(given, self._key) and scheme.lower() == b"bearer"

    def _warn(self, scope: Message) -> None:
        """Says once that somebody came without the key; what they brought is not said."""
        if not self._warned:
            self._warned = True
            host = (scope.get("client") or ("?",))[0]
            logger.warning("refused %r from %s, which did not bring the server's key", scope["path"][:200], host)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
