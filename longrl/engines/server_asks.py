"""Requests to a pool of rollout servers, asked again elsewhere where a server is lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from typing_extensions import override

from longrl.engines import server_protocol as protocol
from longrl.engines.server_client import SERVER_LOST, ServerClient, ServerFailed
from longrl.engines.server_pool import PooledServer, ServerPool
from longrl.engines.turn_requests import ContinuousRequests
from longrl.engines.vllm_options import Fields
from longrl.environments.trajectory import Trajectory
from longrl.io.network_loop import network_loop

MAX_FAILURES = 3
"""So many servers may fail (HTTP 5xx) on one request, then it is the request."""


class PooledRollout:
    """The requests of one rollout, answered in one go.

    Args:
        pool: of servers.
        version: of the weights that sample.
        requests: one for each prompt.
        params: of each.
        names: of the prompts.
    """

    def __init__(self, pool: ServerPool, version: str, requests: Fields, params: Fields, names: Sequence[str]) -> None:
        self._pool = pool
        self._version = version
        self._requests = requests
        self._params = params
        self._names = names
        self._answers: dict[int, Any] = {}
        self._num_failures = 0

    def answers(self) -> list[Fields]:
        """Completions of each request.

        Raises:
            ServersLost: no server is left.
        """
        network_loop().run(self._answer(range(len(self._params))))
        return [self._answers[index] for index in range(len(self._params))]

    async def _answer(self, indices: Sequence[int]) -> None:
        parts = await self._pool.split(indices, [self._params[index]["n"] for index in indices])
        try:
            async with asyncio.TaskGroup() as group:
                for server, part in parts.items():
                    group.create_task(self._ask(server, part))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, server: PooledServer, part: Sequence[int]) -> None:
        """One message to one server."""
        count = sum(self._params[index]["n"] for index in part)
        try:
            async with self._pool.asked(server, count):
                groups = await self._send(server.client, part, None if len(self._pool.servers) == 1 else 0)
        except SERVER_LOST as error:
            self._pool.leave_out(server, error)
            self._num_failures += isinstance(error, ServerFailed)
            if self._num_failures >= MAX_FAILURES:
                raise
            self._pool.num_repeated += count
            await self._answer(part)
            return
        self._answers |= dict(zip(part, groups, strict=True))

    async def _send(self, client: ServerClient, part: Sequence[int], retries: int | None) -> list[Any]:
        """The answer to each request of a part."""
        requests = [self._requests[index] for index in part]
        params = [self._params[index] for index in part]
        names = [self._names[index] for index in part]
        _, groups = await client.generate_async(self._version, requests, params, names=names, retries=retries)
        return groups


class PooledRequests(ContinuousRequests):
    """Turns that the servers of a pool answer, each by a message of its own.

    Args:
        pool: of servers.
        version: of the weights that sample, or `RUN:*`: then answers say which did.
    """

    def __init__(self, pool: ServerPool, version: str) -> None:
        self._pool = pool
        self._version = version
        self._is_continuous = version.endswith(f":{protocol.ANY_STEP}")
        self._sender = uuid.uuid4().hex
        self._pending: dict[Future[dict[str, Any]], Trajectory] = {}
        self._num_cuts = 0
        self._cutting: set[PooledServer] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        """For a server to come back."""
        self._is_over = False

    @property
    @override
    def num_pending(self) -> int:
        return len(self._pending)

    @override
    def add(self, trajectory: Trajectory, request: dict[str, Any], params: dict[str, Any]) -> None:
        prompt_id = trajectory.prompt.id
        asked = self._ask(request, params, f"{prompt_id}#{trajectory.number}", prompt_id)
        self._pending[network_loop().submit(asked)] = trajectory

    @override
    def finished(self, answers: Collection[Future[Any]]) -> list[tuple[Trajectory, dict[str, Any]]]:
        wait([*self._pending, *answers], return_when=FIRST_COMPLETED)
        done = [future for future in self._pending if future.done()]
        return [(self._pending.pop(future), future.result()) for future in done]

    @override
    def cut(self) -> None:
        network_loop().submit(self._cut())

    def close(self) -> None:
        """Hangs up where something is under way, so that the servers stop."""
        self._is_over = True
        for future in self._pending:
            future.cancel()

    async def _ask(self, request: dict[str, Any], params: dict[str, Any], name: str, home: str) -> dict[str, Any]:
        num_cuts = self._num_cuts
        num_failures = 0
        while True:
            server = await self._choose(home, num_cuts)
            if server is None:
                return {"token_ids": [], "logprobs": [], "finish_reason": "cut", **self._said(self._pool.version)}
            try:
                async with self._pool.asked(server, 1):
                    found, ((completion,),) = await server.client.generate_async(
                        self._version, [request], [params], bring_first=True, sender=self._sender, names=[name],
                        retries=0 if self._is_continuous or len(self._pool.servers) > 1 else None,
                    )  # fmt: skip
            except SERVER_LOST as error:
                self._pool.leave_out(server, error)
                num_failures += isinstance(error, ServerFailed)
                if num_failures >= MAX_FAILURES:
                    raise
                self._pool.num_repeated += 1
            else:
                return completion | self._said(found)

    def _said(self, version: str) -> dict[str, Any]:
        return {"version": protocol.step_of(version)} if self._is_continuous else {}

    async def _choose(self, home: str, num_cuts: int) -> PooledServer | None:
        """A server, None where the turn was cut before there was one."""
        task = asyncio.current_task()
        assert task is not None
        if self._num_cuts > num_cuts:
            return None
        self._waiting.add(task)
        try:
            return await self._pool.choose(1, home)
        except asyncio.CancelledError:
            if self._is_over or self._num_cuts == num_cuts or task.uncancel() > 0:
                raise
            return None
        finally:
            self._waiting.discard(task)

    async def _cut(self) -> None:
        self._num_cuts += 1
        for task in self._waiting:
            task.cancel()
        self._waiting.clear()
        asked = {server for server in self._pool.servers if server.is_up and server.under_way} - self._cutting
        self._cutting |= asked
        await asyncio.gather(*[self._cut_at(server) for server in asked])

    async def _cut_at(self, server: PooledServer) -> None:
        try:
            await self._pool.soon(server, server.client.cut_async(self._sender))
        except (
            *SERVER_LOST,
            TimeoutError,
            RuntimeError,
            ValueError,
        ) as error:  # or what is no server of ours
            self._pool.leave_out(server, error)
        finally:
            self._cutting.discard(server)
