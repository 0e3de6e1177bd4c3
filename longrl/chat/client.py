"""Many calls of one endpoint: bounded, repeated where that helps, within a budget, and each paid for once."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from longrl.chat.endpoint import Budget, Endpoint, ImageLoader, Request
from longrl.io.append_log import AppendLog
from longrl.io.http_replies import ACCEPT, ReplyRefused, read_body_async
from longrl.io.pulse import PULSE
from longrl.io.secrets import mask_secrets

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
AGAIN = (408, 409, 425, 429)
"""HTTP statuses below 500 after which the same request may succeed."""
MAX_SPENT = 1e15
"""No call has cost so much, or taken so many tokens."""
SETUP = (401, 403, 404)
"""HTTP statuses that every call would get."""


class Answered(Protocol):
    """What a call was answered with, and what it took."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the server read, by its own count."""

    @property
    def completion_tokens(self) -> int:
        """Tokens that it wrote."""


AnswerT = TypeVar("AnswerT", bound=Answered)
AnswerT_co = TypeVar("AnswerT_co", bound=Answered, covariant=True)


class Call(Protocol[AnswerT_co]):
    """What a server is asked: a chat completion (`Request`), or scores (`longrl.rewards.remote`)."""

    @property
    def model(self) -> str:
        """As the server calls it."""

    @property
    def path(self) -> str:
        """Behind the endpoint's url."""

    @property
    def key(self) -> str:
        """Hash of all that decides the answer."""

    @property
    def num_images(self) -> int:
        """Images and videos that are named."""

    @property
    def load(self) -> ImageLoader | None:
        """Gives those that are sent."""

    def body(self, images: Mapping[str, str], send_seed: bool) -> dict[str, Any]:
        """The JSON that is sent."""

    def recorded(self) -> dict[str, Any]:
        """What the log keeps of it."""

    def read(self, content: bytes) -> tuple[Any, AnswerT_co]:
        """The JSON of the server's answer and what it says; raises ValueError if that is nothing."""

    def read_again(self, entry: dict[str, Any]) -> AnswerT_co:
        """The answer in an entry of the log; raises ValueError or KeyError if it has none."""


class CallFailed(RuntimeError):
    """A call that gave no reply, for good or after all attempts; `kind` is what it is counted under."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class BudgetSpent(ValueError):
    """No further call may be made."""


@dataclass
class Spent:
    """Calls, tokens and cost of a folder, those of earlier runs included."""

    calls: int = 0
    """Answered or failed attempts."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and completions."""
        return self.prompt_tokens + self.completion_tokens


class ReplyCache:
    """The replies in a folder, what they cost, and the budget for more: several endpoints may share it.

    Args:
        folder: of an append-only log.
        budget: over all calls recorded in the folder.
    """

    def __init__(self, folder: str | Path, budget: Budget | None = None) -> None:
        self.log = AppendLog(folder)
        self.budget = budget or Budget()
        self.spent = Spent()
        for entry in self.log.read():
            self._add(entry)

    def reserve(self) -> None:
        """Counts a call that is about to be made.

        Raises:
            BudgetSpent: there is no room for it.
        """
        for name in ("calls", "tokens", "cost"):
            limit, used = getattr(self.budget, f"max_{name}"), getattr(self.spent, name)
            if limit is not None and used >= limit:
                raise BudgetSpent(
                    f"budget.max_{name}={limit:g} is spent ({used:g} used); raise it and run the same command: nothing "
                    "that was answered is asked again"
                )
        self.spent.calls += 1

    def record(self, key: str | None, values: dict[str, Any]) -> None:
        """Writes the outcome of a reserved call."""
        self.log.append(key, values)
        self.spent.calls -= 1
        self._add(values)

    def _add(self, values: dict[str, Any]) -> None:
        self.spent.calls += 1
        self.spent.prompt_tokens += int(_number(values.get("prompt_tokens")))
        self.spent.completion_tokens += int(_number(values.get("completion_tokens")))
        self.spent.cost += _number(values.get("cost"))


replies_in = cache(ReplyCache)
"""One cache per process, folder and budget: what was answered in an earlier step is known."""


class ChatClient:
    """An endpoint as one event loop uses it: `async with ChatClient(endpoint, replies) as client: await client.ask(r)`.

    A request that is answered in the log of replies costs nothing; one that is under way is not made twice.
    """

    def __init__(self, endpoint: Endpoint, replies: ReplyCache) -> None:
        self.endpoint, self.replies = endpoint, replies
        self.num_calls = 0
        """Attempts of this client."""
        self.num_cached = 0
        """Requests that were answered from the log."""
        self.num_failed_attempts = 0
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        self._slots = asyncio.Semaphore(endpoint.concurrency)

    async def __aenter__(self) -> ChatClient:
        endpoint = self.endpoint
        timeout = httpx.Timeout(endpoint.timeout_s, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        proxies = not endpoint.is_local
        headers = endpoint.headers | ACCEPT
        self._http = httpx.AsyncClient(timeout=timeout, headers=headers, limits=limits, trust_env=proxies)
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        await self._http.aclose()

    def attempts(self, make: Callable[[int], Request], form: str, limit: int) -> Iterator[Request]:
        """Requests to make in turn until a reply is usable: those in the log, and then so many more.

        So a command that is given again goes on asking where the one before gave up, instead of reading its replies.

        Args:
            make: number of the attempt -> request, each with another sample.
            form: what a usable reply looks like; every new attempt but the first says it.
            limit: attempts that are not in the log.
        """
        attempt = 0
        while limit > 0:
            request = make(attempt)
            # An earlier release asked again without saying the form.
            if attempt and request.key not in self.replies.log:
                request = request.again(form)
            if request.key not in self.replies.log:
                limit -= 1
            attempt += 1
            yield request

    async def ask(self, request: Call[AnswerT]) -> AnswerT:
        """The reply to a request.

        Raises:
            CallFailed: there is none; another run may try again.
            BudgetSpent: the call may not be made.
            ValueError: the server refuses every call: no such model, a wrong key or url.
        """
        key = request.key
        known = self._known_reply(request, key)
        if known is not None:
            self.num_cached += 1
            return known
        if key not in self._under_way:
            task = asyncio.create_task(self._call(request, key))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        answer: AnswerT = await asyncio.shield(self._under_way[key])
        return answer

    def _known_reply(self, request: Call[AnswerT], key: str) -> AnswerT | None:
        """The reply in the log; None without one, or where an earlier release wrote down one that cannot be read."""
        if key not in self.replies.log:
            return None
        try:
            return request.read_again(self.replies.log[key])
        except (KeyError, ValueError):
            return None

    async def _call(self, request: Call[AnswerT], key: str) -> AnswerT:
        async with self._slots:
            images = await asyncio.to_thread(request.load) if request.load else {}
            broken = request.num_images - len(images)
            body = request.body(images, self.endpoint.send_seed)
            attempts = 0
            while True:
                outcome = await self._attempt(request, key, body, broken)
                attempts += 1
                if not isinstance(outcome, _FailedAttempt):
                    return outcome
                may_succeed = outcome.status is None or outcome.status >= 500 or outcome.status in AGAIN
                may_succeed &= outcome.kind != "too large"
                if not may_succeed or attempts > self.endpoint.retries:
                    break
                longest = min(self.endpoint.backoff_s * 2 ** (attempts - 1), self.endpoint.max_backoff_s)
                jittered = random.uniform(longest / 2, longest)  # calls that failed together return one by one
                await asyncio.sleep(max(jittered, min(outcome.retry_after_s, self.endpoint.max_backoff_s)))
        if outcome.status in SETUP:
            known = "is set" if os.environ.get(self.endpoint.key_variable) else "is not set"
            raise ValueError(
                f"{self.endpoint.url} refuses every call for the model {self.endpoint.model!r}: {outcome.text[:300]}; "
                f"check url and model of the endpoint, and the key in {self.endpoint.key_variable} (key_variable), "
                f"which {known}"
            )
        raise CallFailed(outcome.kind, f"{self.endpoint.url}: {outcome.text[:300]} (attempts: {attempts})")

    async def _attempt(
        self, request: Call[AnswerT], key: str, body: dict[str, Any], broken: int
    ) -> AnswerT | _FailedAttempt:
        """One call; its outcome, good or bad, is on disk when it returns."""
        self.replies.reserve()
        self.num_calls += 1
        started = time.monotonic()
        try:
            outcome = await self._post(request, body, key)
        except (httpx.TimeoutException, TimeoutError) as error:
            outcome = _FailedAttempt("timeout", f"no answer within timeout_s={self.endpoint.timeout_s:g} ({error!r})")
        except ReplyRefused as error:
            outcome = _FailedAttempt(
                "too large", f"{error} (max_reply_mib={self.endpoint.max_reply_mib} of the endpoint)"
            )
        except httpx.TransportError as error:
            outcome = _FailedAttempt("connection", repr(error))
        except asyncio.CancelledError:
            self.replies.record(None, {"failed": key, "kind": "cancelled"})
            raise
        PULSE.beats += 1
        common = {"seconds": round(time.monotonic() - started, 3), "model": request.model}
        if isinstance(outcome, _FailedAttempt):
            self.num_failed_attempts += 1
            logger.debug("%s: %s", self.endpoint.url, outcome.text)
            failure = {"failed": key, "kind": outcome.kind, "status": outcome.status, "text": outcome.text}
            self.replies.record(None, failure | common)
            return outcome
        answer, reply = outcome
        tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        values = {"response": answer, "request": request.recorded(), "cost": self.endpoint.price(**tokens)} | tokens
        if broken:
            reply = replace(reply, broken_images=broken)  # type: ignore[type-var]  # a chat's, which alone has images
            values |= {"broken_images": broken}
        self.replies.record(key, values | common)
        return reply

    async def _post(
        self, request: Call[AnswerT], body: dict[str, Any], key: str
    ) -> tuple[Any, AnswerT] | _FailedAttempt:
        url = self.endpoint.url.rstrip("/") + request.path
        # A gateway that knows the header answers a call from its memory if the reply to it was lost.
        headers = {"Idempotency-Key": key}
        # httpx's own limit is one of each piece: a server that sends a byte a second would be waited for for ever.
        async with (
            asyncio.timeout(self.endpoint.timeout_s),
            self._http.stream("POST", url, json=body, headers=headers) as streamed,
        ):
            response = await read_body_async(streamed, self.endpoint.max_reply_mib << 20)
        if response.status_code != 200:
            status = response.status_code
            return _FailedAttempt(f"http {status}", f"HTTP {status}: {response.text}", status, _retry_after_s(response))
        try:
            return request.read(response.content)
        except ValueError as error:
            return _FailedAttempt("garbled", f"{error}: {response.text}")


@dataclass(frozen=True)
class _FailedAttempt:
    """An attempt without a reply."""

    kind: str
    text: str
    status: int | None = None
    retry_after_s: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", mask_secrets(self.text))  # it goes to journals and logs


def _number(value: object) -> float:
    """A number of a journal that others may have written to; 0 for anything else."""
    if not isinstance(value, int | float) or not abs(value) < MAX_SPENT:
        return 0.0
    return value


def _retry_after_s(reply: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 where it says nothing, or names a date."""
    try:
        return max(0.0, float(reply.headers.get("Retry-After", 0.0)))
    except ValueError:
        return 0.0
