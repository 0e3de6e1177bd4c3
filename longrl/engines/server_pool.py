"""The rollout servers of a run as one of its ranks uses them: where a request goes, who is there, who came back.

A request goes to the server with most free slots for this rank, a trajectory's later turns to where its keys and values
are. A server that cannot be reached, fails or has lost its weights is left out at once; what it was asked is asked
elsewhere, with the same seeds. In the background the pool looks whether those that are left out are back, gives them
the weights of the last sync where they are still at hand, and whether the others still answer.

All methods run in the network's thread, except where they say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longrl.engines import server_protocol as protocol
from longrl.engines.server_client import RESUME, SERVER_LOST, ServerClient, WeightsGone

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

DEFAULT_SLOTS = 256
"""Of a server that does not say it: completions that vLLM decodes together by default."""
CHECK_S = 5.0
"""Between two looks at servers that answer."""
RETURN_S = 0.5
"""Between two looks at servers that are left out."""
CHECK_TIMEOUT_S = 30.0
"""A server that does not even say within this time that it is well has stopped."""
MAX_HOMES = 4096
"""Prompts of which the pool remembers where their keys and values are."""


class ServersLost(ConnectionError):
    """No rollout server is left, and none has come back in time."""


def lost_servers(error: BaseException) -> str | None:
    """What an error says of lost servers, on this rank or, as `raise_on_any_rank` tells it, on another; else None."""
    problem = " ".join(str(error).split())
    is_of_other_rank = isinstance(error, RuntimeError) and f"{ServersLost.__name__}(" in problem
    return problem if isinstance(error, ServersLost) or is_of_other_rank else None


@dataclass(eq=False)
class PooledServer:
    """A server, as far as this rank knows."""

    client: ServerClient
    number: int
    is_up: bool = True
    has_weights: bool = True
    """Those of the last sync, or of any step of the run."""
    slots: int = DEFAULT_SLOTS
    under_way: int = 0
    """Completions that this rank has asked it for."""
    asking: set[asyncio.Task[Any]] = field(default_factory=set)
    """What waits for it."""
    problem: str = ""
    """Why it is left out."""
    is_taken: bool = False
    """It holds another run's weights, and is not taken back before the next sync."""

    @property
    def is_ready(self) -> bool:
        """Requests may go there."""
        return self.is_up and self.has_weights


class ServerPool:
    """All servers of a run.

    Args:
        clients: of the servers.
        recover_timeout_s: how long a request waits where none is left.
        resend: gives a server that came back the weights of the last sync; False where that cannot be done.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        recover_timeout_s: float,
        resend: Callable[[ServerClient], Awaitable[bool]],
    ) -> None:
        self.servers = [PooledServer(client, number) for number, client in enumerate(clients)]
        self.recover_timeout_s = recover_timeout_s
        self.version = protocol.NO_VERSION
        """Of the last sync."""
        self._version_before = protocol.NO_VERSION
        """While there is a sync, of the one before: by those weights servers sample until they are given others."""
        self.num_ranks = 1
        self.rank = 0
        self.num_losses = 0
        """Servers that were left out so far."""
        self.num_repeated = 0
        """Completions that were asked for once more so far."""
        self._resend = resend
        self._changed = asyncio.Event()
        self._dropped: set[asyncio.Task[Any]] = set()
        """Tasks that were cancelled because their server is gone."""
        self._homes: OrderedDict[str, PooledServer] = OrderedDict()
        self._watching: asyncio.Task[None] | None = None

    # -- where a request goes ------------------------------------------------------------------------------------

    async def choose(self, count: int, home: str = "") -> PooledServer:
        """A server for `count` completions more, once there is one.

        Args:
            count: of completions.
            home: what the request has in common with others whose keys and values it may reuse.

        Raises:
            ServersLost: there is none, for too long.
        """
        deadline = time.monotonic() + self.recover_timeout_s
        while True:
            ready = [server for server in self.servers if server.is_ready]
            if ready:
                return self._freest(ready, count, home)
            changed = self._changed
            left = deadline - time.monotonic()
            if left <= 0 or all(server.is_taken for server in self.servers):
                raise self.lost()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()

    async def split(self, items: Sequence[ItemT], counts: Sequence[int]) -> dict[PooledServer, list[ItemT]]:
        """Requests over the servers that are there.

        Args:
            items: the requests.
            counts: completions of each.
        """
        await self.choose(0)
        ready = [server for server in self.servers if server.is_ready]
        given = dict.fromkeys(ready, 0)
        parts: dict[PooledServer, list[ItemT]] = {}
        for item, count in zip(items, counts, strict=True):
            server = max(ready, key=lambda one: (self._free(one) - given[one], self._preference(one)))
            given[server] += count
            parts.setdefault(server, []).append(item)
        return parts

    def _freest(self, ready: Sequence[PooledServer], count: int, home: str) -> PooledServer:
        known = self._homes.get(home)
        if known is not None and known in ready and self._free(known) >= count:
            server = known
        else:
            server = max(ready, key=lambda one: (self._free(one), self._preference(one)))
        if home:
            self._homes[home] = server
            self._homes.move_to_end(home)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)
        return server

    def _free(self, server: PooledServer) -> float:
        """Slots of this rank's share."""
        return server.slots / self.num_ranks - server.under_way

    def _preference(self, server: PooledServer) -> int:
        """Among equals every rank begins with another server."""
        return -((server.number - self.rank) % len(self.servers))

    @contextlib.asynccontextmanager
    async def asked(self, server: PooledServer, count: int) -> AsyncIterator[None]:
        """Around a request: its slots are taken, and it is cancelled if the server is found to be gone."""
        task = asyncio.current_task()
        assert task is not None
        server.under_way += count
        server.asking.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._dropped or task.uncancel() > 0:  # its sender gives it up
                raise
            raise ConnectionError(server.problem) from None
        finally:
            server.under_way -= count
            server.asking.discard(task)
            self._dropped.discard(task)

    # -- who is there --------------------------------------------------------------------------------------------

    def leave_out(self, server: PooledServer, error: BaseException) -> None:
        """A server has failed: it is asked for nothing more until it is back."""
        if isinstance(error, WeightsGone):
            was_ready, server.has_weights = server.is_ready, False
        else:
            was_ready, server.is_up = server.is_ready, False
        if not was_ready:
            return
        server.problem = str(error)
        server.client.forget_tensors()
        self.num_losses += 1
        others = sum(one.is_ready for one in self.servers)
        logger.warning(
            "the rollout server at %s is left out until it is back (%s); %d of %d are there",
            server.client.url, " ".join(str(error).split())[:300], others, len(self.servers),
        )  # fmt: skip
        self._tell()
        if server.is_up:
            return
        for task in server.asking - {asyncio.current_task()}:
            self._dropped.add(task)
            task.cancel()

    def welcome(self, server: PooledServer, info: Mapping[str, Any]) -> None:
        """A server answers with this description."""
        was_ready = server.is_ready
        server.is_up = True
        known = {self.version, self._version_before} - {protocol.NO_VERSION}
        server.has_weights = info["version"] in known
        server.is_taken = server.is_taken and not server.has_weights
        server.slots = int(info.get("slots", DEFAULT_SLOTS))
        if server.is_ready and not was_ready:
            if server.problem:
                logger.info("the rollout server at %s is back", server.client.url)
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def lost(self) -> ServersLost:
        """What there is to say where no server is left."""
        problems = "; ".join(f"{server.client.url}: {server.problem}" for server in self.servers)
        waited = f" for recover_timeout_s={self.recover_timeout_s:g}" if self.recover_timeout_s else ""
        return ServersLost(f"no rollout server is left{waited} ({problems}). To go on, {RESUME}")

    async def look(self, numbers: Iterable[int]) -> dict[int, dict[str, Any] | str]:
        """Asks servers for their descriptions; {number: description, or what is wrong}."""
        chosen = [self.servers[number] for number in numbers]
        found = await asyncio.gather(*[self._look_at(server) for server in chosen])
        return {server.number: info for server, info in zip(chosen, found, strict=True)}

    async def _look_at(self, server: PooledServer) -> dict[str, Any] | str:
        try:
            if len(self.servers) == 1:
                return await server.client.get_info_async()
            return await self.soon(server, server.client.get_info_async(retries=0))
        except (*SERVER_LOST, TimeoutError) as error:
            return str(error)

    async def soon(self, server: PooledServer, answer: Awaitable[ItemT]) -> ItemT:
        """An answer that no work stands before.

        Raises:
            TimeoutError: it does not come, for the server hangs.
        """
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await answer
        except TimeoutError as error:
            raise TimeoutError(
                f"the server at {server.client.url} hangs: no answer within {CHECK_TIMEOUT_S:g} s; its log may say why"
            ) from error

    async def adopt(self, found: Mapping[int, dict[str, Any] | str]) -> None:
        """Takes what the ranks have found of all servers."""
        for number, info in found.items():
            if isinstance(info, str):
                self.leave_out(self.servers[number], ConnectionError(info))
            else:
                self.welcome(self.servers[number], info)

    # -- in the background ---------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """A sync is over: begins to look after the servers, for as long as the pool is used."""
        self._version_before = self.version
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    async def begin_sync(self, version: str) -> None:
        """Stops looking, which would go on giving older weights to servers that come back."""
        await self.rest()
        if version != self.version:
            self._version_before, self.version = self.version, version

    async def rest(self) -> None:
        """Stops looking: nothing is sent to any server that nobody asked for."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    async def _watch(self) -> None:
        last_check = time.monotonic()
        while True:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETURN_S):
                    await changed.wait()
                    await asyncio.sleep(RETURN_S)
            out = [server for server in self.servers if not server.is_ready]
            await asyncio.gather(*[self._bring_back(server) for server in out])
            if time.monotonic() - last_check > CHECK_S:
                last_check = time.monotonic()
                await asyncio.gather(*[self._check(server) for server in self.servers if server.is_ready])

    async def _bring_back(self, server: PooledServer) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                info = await server.client.get_info_async(retries=0)
            server.is_taken = protocol.run_of(info["version"]) not in ("", protocol.run_of(self.version))
            if server.is_taken:
                self._tell()
            elif info["version"] != self.version and await self._resend(server.client):
                info = await server.client.get_info_async(retries=0)
        except Exception as error:  # it is still gone, or gone again
            logger.debug("%s: %r", server.client.url, error)
            return
        self.welcome(server, info)

    async def _check(self, server: PooledServer) -> None:
        """Has a server that hangs, or has gone without a word, left out; its requests would wait for ever."""
        try:
            await self.soon(server, server.client.get_info_async(retries=0))
        except Exception as error:  # whatever it is: a server that does not answer as one is none
            self.leave_out(server, error)
