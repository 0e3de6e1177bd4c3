"""HTTP to one `python -m longrl serve`: what may be repeated is, and every failure says what to do about it."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from torch import Tensor

from longrl.engines import server_protocol as protocol
from longrl.engines.server_key import KEY_VARIABLE, client_key, key_file
from longrl.io.http_replies import ACCEPT, ReplyRefused, read_body_async
from longrl.io.network_loop import network_loop
from longrl.io.secrets import check_no_password, mask_secrets

logger = logging.getLogger(__name__)

BUSY = (429, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""
CONNECT_S = 10.0
IDLE_S = 1.0
"""A connection that was idle so long is not used again."""
MAX_BROUGHT = 1 << 16
"""Names of tensors that are remembered of a server; then it is asked anew which ones it has."""
MAX_ANSWER_BYTES = 1 << 30
"""Limit of an answer: 10 million tokens with their log-probabilities take about 300 MB."""
RESUME = (
    "start the server again (python -m longrl serve --config ... --port ...), then the run from its last checkpoint: "
    "the same command with --ckpt_path RUN_DIR/checkpoints/last.ckpt"
)


class WeightsGone(RuntimeError):
    """A server holds other weights than those that were asked for: it was started anew, or serves another run."""


class ServerFailed(RuntimeError):
    """A server could not answer, and may be about to end."""


SERVER_LOST = (ConnectionError, WeightsGone, ServerFailed)
"""Errors after which another server may answer."""


class ServerClient:
    """One server. Its methods wait in the calling thread, those that end in `_async` in the network's.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        timeout_s: of one answer, all of it; a request that takes longer is an error.
        retries: further attempts where the server cannot be reached or is busy, after 1, 2, 4... seconds.
        owner: what has these options, for errors.
    """

    def __init__(self, url: str, timeout_s: float, retries: int, owner: str = "VLLMServerEngine") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"urls of {owner} must begin with http:// or https://, got {url!r}")
        check_no_password(url, f"urls of {owner}")
        self.owner = owner
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._bringing = asyncio.Lock()
        self._num_failures = 0  # of bringing
        self._brought: set[str] = set()  # names of tensors that the server was given with the weights of a version
        self._brought_with = ""

    @functools.cached_property
    def _http(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self.timeout_s, connect=CONNECT_S)
        # A turn waits on its own connection, however many there are. The server closes those idle for 5 s, and a
        # request that is on its way just then would look like a server that has died.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
        return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)  # no proxy between node and server

    def close(self) -> None:
        """Closes connections."""
        network_loop().run(self._http.aclose())
        del self._http

    # -- what the server can do ----------------------------------------------------------------------------------

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """`get_info`, once a server that is still starting answers."""
        return network_loop().run(self.wait_until_ready_async(timeout_s))

    async def wait_until_ready_async(self, timeout_s: float) -> dict[str, Any]:
        """As `wait_until_ready`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        logger.info("waiting up to %.0f s for the server at %s", timeout_s, self.url)
        while True:
            try:
                return await self.get_info_async(retries=0)
            except ConnectionError:
                if loop.time() > deadline:
                    raise
            await pause(1.0)

    def get_info(self, retries: int | None = None) -> dict[str, Any]:
        """The server's description and which weights it holds; `retries` instead of the client's."""
        return network_loop().run(self.get_info_async(retries))

    async def get_info_async(self, retries: int | None = None) -> dict[str, Any]:
        """As `get_info`."""
        answer = await self.send_async("GET", "/info", retries=retries)
        if not {"vllm", "version", "model", "max_model_len"} <= answer.keys():
            raise RuntimeError(f"{self._garbage()} its /info has {sorted(answer)}")
        return answer

    def load_weights(self, folder: str, version: str) -> None:
        """Has the server take over the weights of a folder."""
        network_loop().run(self.load_weights_async(folder, version))

    async def load_weights_async(self, folder: str, version: str) -> None:
        """As `load_weights`."""
        order = json.dumps({"folder": folder, "version": version}).encode()
        self._weights_answer(await self.send_async("POST", "/weights", order), version)

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

    async def cut_async(self, sender: str) -> None:
        """Has the server end what it is sampling for a sender."""
        await self.send_async("POST", "/cut", json.dumps({"sender": sender}).encode(), retries=0)

    def generate(
        self,
        version: str,
        requests: Sequence[dict[str, Any]],
        params: Sequence[dict[str, Any]],
        bring_first: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """The completions of `generate_async`."""
        return network_loop().run(self.generate_async(version, requests, params, bring_first))[1]

    async def generate_async(
        self,
        version: str,
        requests: Sequence[dict[str, Any]],
        params: Sequence[dict[str, Any]],
        bring_first: bool = False,
        *,
        sender: str = "",
        names: Sequence[str] = (),
        retries: int | None = None,
    ) -> tuple[str, list[list[dict[str, Any]]]]:
        """Completions of each request by the weights of a version, as token ids, log-probs and finish reasons.

        The first attempt brings no tensor; the server names those that it lacks. To cancel it is to hang up, and the
        server stops.

        Args:
            version: of the weights, or `RUN:*` for any of the run's.
            requests: see `server_protocol`.
            params: of each request.
            bring_first: tensors go over before, so that of several requests with the same ones one alone brings them.
            sender: whose requests a cut ends.
            names: of the requests, for the server's log.
            retries: instead of the client's.

        Returns:
            (the version of the weights that sampled, completions)
        """
        # 1. Ask, and bring what the server lacks.
        tensors: dict[str, Tensor] = {}
        text = await asyncio.to_thread(protocol.dump_requests, requests, tensors)
        if bring_first:
            await self._bring(version, tensors, retries)
        message = {"version": version, "requests": text, "tensors": list(tensors), "params": list(params)}
        message |= {"sender": sender} if sender else {}
        message |= {"names": [name[: protocol.MAX_NAME] for name in names]} if names else {}
        answer = await self._ask_with(message, tensors, "/generate", retries)
        # 2. The answer must be by the weights, and have the completions, that were asked for.
        found = answer.get("version")
        if not isinstance(found, str) or not protocol.is_asked(found, version):
            raise RuntimeError(
                f"the server at {self.url} answered with weights {found!r} instead of {version!r}; "
                "give every run a server of its own"
            )
        completions: Any = answer.get("completions")
        counts = [len(group) for group in completions] if isinstance(completions, list) else None
        if counts != [each["n"] for each in params]:
            raise RuntimeError(f"{self._garbage()} completions per prompt: {counts}")
        return found, completions

    async def score_async(
        self,
        requests: Sequence[dict[str, Any]],
        counts: Sequence[int],
        groups: Sequence[int],
        top_k: int,
        retries: int | None = None,
    ) -> list[dict[str, Any]]:
        """What a server of its own weights says of the last tokens of each request; see `server_scores`.

        Args:
            requests: prompts with what follows them; see `server_protocol`.
            counts: tokens of each that are scored.
            groups: numbers of neighbouring requests with one prompt.
            top_k: of the likeliest tokens.
            retries: instead of the client's.
        """
        tensors: dict[str, Tensor] = {}
        text = await asyncio.to_thread(protocol.dump_requests, requests, tensors)
        message: dict[str, Any] = {"version": protocol.OWN_WEIGHTS, "requests": text, "tensors": list(tensors)}
        message |= {"counts": list(counts), "groups": list(groups), "top_k": top_k}
        answer = await self._ask_with(message, tensors, "/score", retries)
        scores: Any = answer.get("scores")
        lengths = [len(each["logprobs"]) for each in scores] if isinstance(scores, list) else None
        if lengths != list(counts):
            raise RuntimeError(f"{self._garbage()} scored tokens per request: {lengths}")
        return list(scores)

    async def _ask_with(
        self, message: dict[str, Any], tensors: Mapping[str, Tensor], path: str, retries: int | None
    ) -> dict[str, Any]:
        """The answer to a message, once the server has been brought what it lacks of some tensors."""
        brought: dict[str, Tensor] = {}
        while True:
            answer = await self._ask(message, brought, retries, path)
            if "missing" not in answer:
                return answer
            lacking = set(answer["missing"]) & (tensors.keys() - brought.keys())
            if not lacking:
                raise RuntimeError(f"{self._garbage()} it misses tensors that no request has: {answer['missing']}")
            brought |= {name: tensors[name] for name in lacking}

    async def _ask(
        self, message: dict[str, Any], tensors: Mapping[str, Tensor], retries: int | None, path: str = "/generate"
    ) -> dict[str, Any]:
        body = await asyncio.to_thread(protocol.pack_message, message, tensors)
        return await self.send_async("POST", path, body, accepted=protocol.MISSING, retries=retries)

    async def _bring(self, version: str, tensors: Mapping[str, Tensor], retries: int | None) -> None:
        """Gives the server what it lacks of some tensors, by a message that asks for no completion."""
        num_failures = self._num_failures
        async with self._bringing:
            if self._num_failures > num_failures:  # else requests would find out one after the other
                raise ConnectionError(
                    f"the server at {self.url} could not be brought tensors by another request either"
                )
            if self._brought_with != version or len(self._brought) > MAX_BROUGHT:
                self._brought.clear()
                self._brought_with = version
            names = sorted(tensors.keys() - self._brought)
            if not names:
                return
            message = {"version": version, "requests": "[]", "tensors": names, "params": []}
            try:
                answer = await self._ask(message, {}, retries)
                lacking = {name: tensors[name] for name in answer.get("missing", ()) if name in tensors}
                if lacking:
                    await self._ask(message, lacking, retries)
            except Exception:
                self._num_failures += 1
                raise
            self._brought.update(names)

    def forget_tensors(self) -> None:
        """The server may be another process than before, which was brought nothing."""
        self._brought.clear()

    def _headers(self) -> dict[str, str]:
        """Made for each request: a server that was started anew has another key in its file."""
        key = client_key(self.url)
        return ACCEPT | ({"Authorization": f"Bearer {key}"} if key else {})

    # -- transport -----------------------------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, body: bytes | None = None, *, accepted: int = 200, retries: int | None = None
    ) -> dict[str, Any]:
        """As `send_async`."""
        return network_loop().run(self.send_async(method, path, body, accepted=accepted, retries=retries))

    async def send_async(
        self, method: str, path: str, body: bytes | None = None, *, accepted: int = 200, retries: int | None = None
    ) -> dict[str, Any]:
        """The JSON of an answer with status 200 or `accepted`; repeated while the server is busy or out of reach."""
        attempts = 1 + (self.retries if retries is None else retries)
        problem = ""
        for attempt in range(attempts):
            if attempt:
                logger.warning("%s%s: %s; attempt %d of %d", self.url, path, problem, attempt + 1, attempts)
                await pause(2.0 ** (attempt - 1))
            try:
                address = self.url + protocol.PREFIX + path
                sent = self._http.stream(method, address, content=body, headers=self._headers())
                async with asyncio.timeout(self.timeout_s), sent as streamed:
                    reply = await read_body_async(streamed, MAX_ANSWER_BYTES)
            except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
                raise TimeoutError(
                    f"the server at {self.url} did not answer {path} within timeout_s={self.timeout_s:g}; raise "
                    f"timeout_s of {self.owner} if rollouts take longer, or look into the server's log"
                ) from error
            except ReplyRefused as error:
                raise RuntimeError(f"{self._garbage()} {error}") from error
            except httpx.TransportError as error:
                problem = repr(error)
                if attempt + 1 < attempts:
                    continue
                raise ConnectionError(
                    f"the vLLM server at {self.url} cannot be reached, or died ({problem}, attempts: {attempts}); "
                    f"its log says why. Check urls of {self.owner}, or {RESUME}"
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
            return WeightsGone(
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
            return ConnectionError(f"{message}, after {self.retries + 1} attempts; raise retries of {self.owner}")
        if reply.status_code < 500:
            return ValueError(message)
        return ServerFailed(f"{message}. If the server ended, {RESUME}")

    def _garbage(self) -> str:
        return f"what answers at {self.url} is not this version's `python -m longrl serve`;"


async def pause(seconds: float) -> None:
    """Waits before a further attempt."""
    await asyncio.sleep(seconds)


def _message(reply: httpx.Response) -> str:
    """The message in an error's body, in vLLM's spelling or FastAPI's, or its first characters."""
    try:
        body = reply.json()
    except ValueError:
        return repr(mask_secrets(reply.text[:500]))
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return mask_secrets(str(error.get("message", error)) if isinstance(error, dict) else str(error))
