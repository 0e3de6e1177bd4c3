"""A chat server of a few lines: each call gets the next of a list of outcomes, the last one for ever."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text: str, **choice) -> dict:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": usage}


class Server:
    """A server of chat completions.

    Args:
        outcomes: a status, raw bytes, a dict to send as JSON, seconds to hang, or a function of the request's body.
        headers: of its replies.
        models: what `GET /v1/models` lists; None is a server without that route.
    """

    def __init__(self, *outcomes, headers=(), models: list[dict] | None = None) -> None:
        self.outcomes, self.headers, self.models = list(outcomes), dict(headers), models
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                owner.answer(self)

            def do_GET(self):
                found = owner.models is not None and self.path == "/v1/models"
                owner.send(self, 200 if found else 404, json.dumps({"data": owner.models} if found else {}).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        outcome = outcome(body) if callable(outcome) else outcome
        if isinstance(outcome, float):
            time.sleep(outcome)
            outcome = completion("late")
        status = outcome if isinstance(outcome, int) else 200
        content = outcome if isinstance(outcome, bytes) else json.dumps(outcome).encode()
        with self._lock:
            self._now -= 1
        self.send(handler, status, content)

    def send(self, handler, status: int, content: bytes) -> None:
        handler.send_response(status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


class Dripping(Server):
    """Sends its replies a byte at a time, or a reply that has no end."""

    def __init__(self, *outcomes, pause_s: float = 0.05, endless: bytes = b"", headers=()) -> None:
        super().__init__(*outcomes, headers=headers)
        self.pause_s, self.endless = pause_s, endless
        self.num_sent = 0

    def send(self, handler, status: int, content: bytes) -> None:
        handler.send_response(status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        pieces = itertools.repeat(self.endless) if self.endless else (content[i : i + 1] for i in range(len(content)))
        with contextlib.suppress(OSError):  # who asked has hung up
            for piece in pieces:
                handler.wfile.write(piece)
                handler.wfile.flush()
                self.num_sent += len(piece)
                time.sleep(self.pause_s)
