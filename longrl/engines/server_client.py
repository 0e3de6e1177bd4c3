"""HTTP to one `python -m longrl serve`: what may be repeated is, and every failure says what to do about it."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from torch import Tensor

from longrl.engines import server_protocol as protocol
from longrl.engines.server_key import KEY_VARIABLE, client_key, key_file
from longrl.io.http_replies import ACCEPT, ReplyRefused, read_body
from longrl.io.secrets import check_no_password, mask_secrets

logger = logging.getLogger(__name__)

BUSY = (429, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""
CONNECT_S = 10.0
MAX_ANSWER_BYTES = 1 << 30
"""Limit of an answer: 10 million tokens with their log-probabilities take about 300 MB."""
RESUME = (
    "start the server again (python -m longrl serve --config ... --port ...), then the run from its last checkpoint: "
    "the same command with --ckpt_path RUN_DIR/checkpoints/last.ckpt"
)


class ServerClient:
    """One server, as several threads may use it.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        timeout_s: of one answer, all of it; a request that takes longer is an error.
        retries: further attempts where the server cannot be reached or is busy, after 1, 2, 4... seconds.
    """

    def __init__(self, url: str, timeout_s: float, retries: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"urls of VLLMServerEngine must begin with http:// or https://, got {url!r}")
        check_no_password(url, "urls of VLLMServerEngine")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._bringing = threading.Lock()
        self._num_failures = 0  # of bringing
        self._brought: set[str] = set()  # names of tensors that the server was given with the weights of a version
        self._brought_with = ""

    @functools.cached_property
    def _http(self) -> httpx.Client:
        timeout = httpx.Timeout(self.timeout_s, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None)  # a turn waits on its own connection, however many there are
        return httpx.Client(timeout=timeout, limits=limits, trust_env=False)  # no proxy between node and server

    def close(self) -> None:
        """Closes connections."""
        self._http.close()
        del self._http

    # -- what the server can do ----------------------------------------------------------------------------------

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """`get_info`, once a server that is still starting answers."""
        deadline = time.monotonic() + timeout_s
        logger.info("waiting up to %.0f s for the server at %s", timeout_s, self.url)
        while True:
            try:
                return self.get_info(retries=0)
            except ConnectionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def get_info(self, retries: int | None = None) -> dict[str, Any]:
        """The server's description and which weights it holds; `retries` instead of the client's."""
        answer = self._send("GET", "/info", retries=retries)
        if not {"vllm", "version", "model", "max_model_len"} <= answer.keys():
            raise RuntimeError(f"{self._garbage()} its /info has {sorted(answer)}")
        return answer

    def load_weights(self, folder: str, version: str) -> None:
        """Has the server take over the weights of a folder."""
        self.order_weights({"folder": folder, "version": version}, self.retries)

    def weight_digests(self) -> list[dict[str, str]]:
        """{parameter: hash of its content} of each of the server's workers, by vLLM's names."""
        return list(self._send("GET", "/weights")["workers"])

    def order_weights(self, order: Mapping[str, Any], retries: int = 0) -> None:
        """Has the server do with weights what an order says (`weight_orders`)."""
        self._weights_answer(
            self._send("POST", "/weights", json.dumps(order).encode(), retries=retries), order["version"]
        )

    def load_adapters(self, order: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Has the server take over adapters (`weight_adapters`)."""
        body = protocol.pack_message(dict(order), tensors)
        self._weights_answer(self._send("POST", "/adapters", body), order["version"])

    def _weights_answer(self, answer: Mapping[str, Any], version: str) -> None:
        if answer.get("version") != version:
            raise RuntimeError(f"the server at {self.url} holds weights {answer.get('version')!r} after {version!r}")

    def generate(
        self,
        version: str,
        requests: Sequence[dict[str, Any]],
        params: Sequence[dict[str, Any]],
        bring_first: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """Completions of each request by the weights of a version, as token ids, log-probs and finish reasons.

        The first attempt brings no tensor; the server names those that it lacks.

        Args:
            version: of the weights.
            requests: see `server_protocol`.
            params: of each request.
            bring_first: tensors go over before, so that of several threads with the same ones one alone brings them.
        """
        # 1. Ask, and bring what the server lacks.
        tensors: dict[str, Tensor] = {}
        text = protocol.dump_requests(requests, tensors)
        if bring_first:
            self._bring(version, tensors)
        message = {"version": version, "requests": text, "tensors": list(tensors), "params": list(params)}
        brought: dict[str, Tensor] = {}
        while True:
            answer = self._send("POST", "/generate", protocol.pack_message(message, brought), accepted=protocol.MISSING)
            if "missing" not in answer:
                break
            lacking = set(answer["missing"]) & (tensors.keys() - brought.keys())
            if not lacking:
                raise RuntimeError(f"{self._garbage()} it misses tensors that no request has: {answer['missing']}")
            brought |= {name: tensors[name] for name in lacking}
        # 2. The answer must be by the weights, and have the completions, that were asked for.
        if answer.get("version") != version:
            raise RuntimeError(
                f"the server at {self.url} answered with weights {answer.get('version')!r} instead of {version!r}; "
                "give every run a server of its own"
            )
        completions: Any = answer.get("completions")
        counts = [len(group) for group in completions] if isinstance(completions, list) else None
        if counts != [each["n"] for each in params]:
            raise RuntimeError(f"{self._garbage()} completions per prompt: {counts}")
        return completions

    def _bring(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        """Gives the server what it lacks of some tensors, by a message that asks for no completion."""
        num_failures = self._num_failures
        with self._bringing:
            if self._num_failures > num_failures:  # else threads would find out one after the other
                raise ConnectionError(f"the server at {self.url} could not be brought tensors by another thread either")
            if self._brought_with != version:
                self._brought.clear()
                self._brought_with = version
            names = sorted(tensors.keys() - self._brought)
            if not names:
                return
            message = {"version": version, "requests": "[]", "tensors": names, "params": []}
            try:
                answer = self._send("POST", "/generate", protocol.pack_message(message, {}), accepted=protocol.MISSING)
                lacking = {name: tensors[name] for name in answer.get("missing", ()) if name in tensors}
                if lacking:
                    self._send("POST", "/generate", protocol.pack_message(message, lacking), accepted=protocol.MISSING)
            except Exception:
                self._num_failures += 1
                raise
            self._brought.update(names)

    def _headers(self) -> dict[str, str]:
        """Made for each request: a server that was started anew has another key in its file."""
        key = client_key(self.url)
        return ACCEPT | ({"Authorization": f"Bearer {key}"} if key else {})

    # -- transport -----------------------------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, body: bytes | None = None, *, accepted: int = 200, retries: int | None = None
    ) -> dict[str, Any]:
        """The JSON of an answer with status 200 or `accepted`; repeated while the server is busy or out of reach."""
        attempts = 1 + (self.retries if retries is None else retries)
        problem = ""
        for attempt in range(attempts):
            if attempt:
                logger.warning("%s%s: %s; attempt %d of %d", self.url, path, problem, attempt + 1, attempts)
                time.sleep(2.0 ** (attempt - 1))
            try:
                address = self.url + protocol.PREFIX + path
                with self._http.stream(method, address, content=body, headers=self._headers()) as streamed:
                    reply = read_body(streamed, self.timeout_s, MAX_ANSWER_BYTES)
            except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
                raise TimeoutError(
                    f"the server at {self.url} did not answer {path} within timeout_s={self.timeout_s:g}; raise "
                    f"timeout_s of VLLMServerEngine if rollouts take longer, or look into the server's log"
                ) from error
            except ReplyRefused as error:
                raise RuntimeError(f"{self._garbage()} {error}") from error
            except httpx.TransportError as error:
                problem = repr(error)
                if attempt + 1 < attempts:
                    continue
                raise ConnectionError(
                    f"the vLLM server at {self.url} cannot be reached, or died ({problem}, attempts: {attempts}); "
                    f"its log says why. Check urls of VLLMServerEngine, or {RESUME}"
                ) from error
            if reply.status_code not in BUSY:
                break
            problem = f"busy, HTTP {reply.status_code}"
        if reply.status_code not in (200, accepted):
            raise self._refused(reply, path)
        try:
            answer = reply.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RuntimeError(f"{self._garbage()} {reply.text[:200]!r}")
        return answer

    def _refused(self, reply: httpx.Response, path: str) -> Exception:
        """The error that a status means."""
        message = f"the server at {self.url} refused {path} with HTTP {reply.status_code}: {_message(reply)}"
        if reply.status_code == protocol.OTHER_VERSION:
            return RuntimeError(
                f"{message}. It was started anew in the middle of a step, or serves another run too: give every run a "
                f"server of its own, then go on from the last checkpoint (--ckpt_path RUN_DIR/checkpoints/last.ckpt)"
            )
        if reply.status_code == 401:
            return PermissionError(
                f"{message}; set {KEY_VARIABLE} to the same key for server and trainer. Without it a server of this "
                f"machine and user leaves its key in {key_file(urlsplit(self.url).port or 80)}"
            )
        if reply.status_code == 404 and path == "/info":
            return ValueError(
                f"{message}. It has no routes of longrl: `vllm serve` does not take features and weights; start "
                "`python -m longrl serve --config ...` with the run's config"
            )
        if reply.status_code in BUSY:
            return ConnectionError(f"{message}, after {self.retries + 1} attempts; raise retries of VLLMServerEngine")
        if reply.status_code < 500:
            return ValueError(message)
        return RuntimeError(f"{message}. If the server ended, {RESUME}")

    def _garbage(self) -> str:
        return f"what answers at {self.url} is not this version's `python -m longrl serve`;"


def _message(reply: httpx.Response) -> str:
    """The message in an error's body, in vLLM's spelling or FastAPI's, or its first characters."""
    try:
        body = reply.json()
    except ValueError:
        return repr(mask_secrets(reply.text[:500]))
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return mask_secrets(str(error.get("message", error)) if isinstance(error, dict) else str(error))
