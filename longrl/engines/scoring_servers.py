"""Servers that score given tokens by weights of their own, as the ranks of a run ask them."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from longrl.engines.server import check_server, make_clients
from longrl.engines.server_asks import PooledRollout
from longrl.engines.server_client import ServerClient
from longrl.engines.server_pool import ServerPool
from longrl.engines.server_protocol import OWN_WEIGHTS
from longrl.engines.vllm_options import Fields
from longrl.io.network_loop import network_loop
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredGroup:
    """Completions of one prompt that one server scores, for it keeps the prompt's keys and values."""

    requests: Fields
    """The prompt with each completion behind it."""
    counts: Sequence[int]
    """Tokens of each that are scored."""


class PooledScores(PooledRollout):
    """Groups to be scored, answered in one go.

    Args:
        pool: of servers.
        groups: none of them empty.
        top_k: of the likeliest tokens.
    """

    def __init__(self, pool: ServerPool, groups: Sequence[ScoredGroup], top_k: int) -> None:
        sizes: Fields = [{"n": len(group.counts)} for group in groups]
        super().__init__(pool, OWN_WEIGHTS, [], sizes, [])
        self._groups = groups
        self._top_k = top_k

    @override
    async def _send(self, client: ServerClient, part: Sequence[int], retries: int | None) -> list[Any]:
        chosen = [self._groups[index] for index in part]
        requests = [request for group in chosen for request in group.requests]
        counts = [count for group in chosen for count in group.counts]
        sizes = [len(group.counts) for group in chosen]
        scores = iter(await client.score_async(requests, counts, sizes, self._top_k, retries))
        return [list(itertools.islice(scores, size)) for size in sizes]


class ScoringServers:
    """Servers of one model, each started by `python -m longrl serve --weights family`.

    Args:
        urls: of the servers.
        owner: what has that option, for errors.
        timeout_s: of one answer, all requests of a rank together.
        start_timeout_s: how long the first contact waits for servers that are still starting.
        recover_timeout_s: how long a run waits where no server is left; then it ends. 0: at once.
        retries: further attempts where the only server cannot be reached or is busy, after 1, 2, 4... seconds.
    """

    def __init__(
        self,
        urls: Sequence[str] | str,
        owner: str,
        timeout_s: float,
        start_timeout_s: float,
        recover_timeout_s: float,
        retries: int,
    ) -> None:
        self.clients = make_clients(urls, owner, timeout_s, retries)
        self.start_timeout_s = start_timeout_s
        self.pool = ServerPool(self.clients, recover_timeout_s, _nothing_to_send)
        self.max_model_len = 0
        """Of the shortest server; known once they answer."""

    def start(self, family: CausalFamily, world: Axis) -> None:
        """Waits for the servers, and looks after them from then on. Every rank of the run must call it.

        Raises:
            ConnectionError: none answers.
            ValueError: one serves another model, or weights that a trainer sends it.
        """
        self.pool.rank, self.pool.num_ranks = world.rank, world.size
        deadline = time.monotonic() + self.start_timeout_s
        logger.info("waiting up to %.0f s for %d servers that score", self.start_timeout_s, len(self.clients))
        network_loop().run(self.pool.begin_sync(OWN_WEIGHTS))
        numbers = range(len(self.clients))
        while True:
            with world.raise_on_any_rank():
                found = network_loop().run(self.pool.look(numbers))
            described = {number: info for number, info in found.items() if not isinstance(info, str)}
            is_late = world.max(int(time.monotonic() > deadline))
            if is_late or not world.max(len(found) - len(described)):
                break
            time.sleep(1.0)
        with world.raise_on_any_rank():
            if not described:
                problems = "; ".join(map(str, found.values()))
                raise ConnectionError(
                    f"no server that scores answers within start_timeout_s={self.start_timeout_s:g}: {problems}"
                )
            for number, info in described.items():
                check_server(self.clients[number].url, info, family)
                if info["version"] != OWN_WEIGHTS:
                    raise ValueError(
                        f"the server at {self.clients[number].url} holds weights {info['version']!r}, but a teacher's "
                        "are its model's own; start it by `python -m longrl serve --weights family`"
                    )
        self.max_model_len = min(info["max_model_len"] for info in described.values())
        network_loop().run(self.pool.adopt(found))
        network_loop().run(self.pool.watch())

    def scores(self, groups: Sequence[ScoredGroup], top_k: int) -> list[Fields]:
        """What the servers say of the last tokens of each request of each group; see `server_scores`.

        Raises:
            ServersLost: no server is left.
        """
        return PooledScores(self.pool, groups, top_k).answers()

    def close(self) -> None:
        """Closes connections; servers go on."""
        network_loop().run(self.pool.rest())
        for client in self.clients:
            client.close()


async def _nothing_to_send(client: ServerClient) -> bool:
    """A server that comes back has its weights itself, or is another one."""
    return False
