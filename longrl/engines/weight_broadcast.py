"""Weights from the trainer's shards to the workers of its servers without a file: gathered and sent bucket by bucket.

Rank 0 of the trainer is rank 0 of a group (`weight_group`) whose other members are the workers of all servers, those of
a model split over several GPUs included: each is sent whole weights and takes its part, as it does from files. What
comes is announced by the order, which a server compares with its model before anything is sent.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from longrl.engines.server_client import ServerClient
from longrl.engines.weight_buckets import Listed, cut_buckets, empty_bucket, fill_bucket
from longrl.engines.weight_checks import expected_weights, listed_weights
from longrl.engines.weight_group import GroupAddress, WeightGroup, open_store, reach_store
from longrl.engines.weight_senders import Counted
from longrl.engines.weight_stream import WeightStream
from longrl.models.base import CausalFamily
from longrl.strategies.axis import world_axis

logger = logging.getLogger(__name__)

REFUSAL_S = 5.0
"""How long the answers of servers are waited for once a broadcast has failed."""
Members = list[tuple[str, int, str]]
"""A rank's servers: url, number of workers, and the group that they hold, "" if none."""


class BroadcastSender:
    """Weights over a process group of rank 0 and all servers' workers: NCCL between GPUs, gloo between CPUs.

    The group is kept; after an error, or for a server that came anew, there is a new one. Servers take weights over as
    they come, so `pause` is entered before the first is gathered.

    Args:
        host: address of rank 0's machine that servers reach.
        port: of the store in which members meet; 0 is a free one.
        bucket_mib: of weights in one message; rank 0 and every worker hold that much beside their weights.
        timeout_s: of one message.
    """

    kept: tuple[Path, str] | None = None

    def __init__(self, host: str, port: int, bucket_mib: int, timeout_s: float) -> None:
        self.host = host
        self.port = port
        self.bucket_bytes = bucket_mib << 20
        self.timeout_s = timeout_s
        self._group: WeightGroup | None = None
        self._listed: tuple[CausalFamily, list[Listed]] | None = None

    def send(
        self,
        weights: WeightStream,
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> int:
        """See `WeightSender.send`."""
        world = world_axis()
        with world.raise_on_any_rank():
            listed = self._announced(weights.family)
            infos = [client.get_info() for client in clients]
        local: Members = []
        for client, info in zip(clients, infos, strict=True):
            local.append((client.url, info["num_workers"], info["weight_group"]))
        members = world.gather(local)
        with pause():
            with world.raise_on_any_rank():
                address = self._meet(members)
            address = world.gather(address)[0]
            with world.raise_on_any_rank():
                if world.rank:
                    self._follow(address)
            assert self._group is not None
            # Numbers of a server's workers follow on those of all servers before it.
            counts = [count for of_rank in members for _, count, _ in of_rank]
            before = sum(len(of_rank) for of_rank in members[: world.rank])
            first_ranks = list(itertools.accumulate(counts, initial=1))[before:]
            order = {
                "version": version,
                "group": address.as_json(),
                "weights": [each.as_json() for each in listed],
                "bucket_bytes": self.bucket_bytes,
            }
            orders = [{**order, "first_rank": first} for first in first_ranks[: len(clients)]]
            counted = Counted(weights)
            try:
                with world.raise_on_any_rank():
                    self._deliver(counted, listed, clients, orders)
            except BaseException:
                self.close()
                raise
        return sum(each.nbytes for each in listed)

    def close(self) -> None:
        """Ends the group; the next `send` makes another one."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def _announced(self, family: CausalFamily) -> list[Listed]:
        if self._listed is None or self._listed[0] is not family:
            self._listed = family, listed_weights(expected_weights(family))
        return self._listed[1]

    # -- members -------------------------------------------------------------------------------------------------

    def _meet(self, members: Sequence[Members]) -> GroupAddress | None:
        """Rank 0's group for these servers, the one that they hold if it is one; None on other ranks."""
        if world_axis().rank:
            return None
        held = {group for of_rank in members for _, _, group in of_rank}
        size = 1 + sum(count for of_rank in members for _, count, _ in of_rank)
        group = self._group
        if group is not None and held == {group.address.name} and group.address.size == size:
            return group.address
        self.close()
        store, port = open_store(self.host, self.port, self.timeout_s)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        address = GroupAddress(uuid.uuid4().hex, self.host, port, size, backend, self.timeout_s)
        self._group = WeightGroup(address, 0, device, store)
        logger.info("weights are sent to %d workers over %s, who meet at %s:%d", size - 1, backend, self.host, port)
        return address

    def _follow(self, address: GroupAddress) -> None:
        """The other ranks are no members, but say so if one of their servers fails."""
        if self._group is None or self._group.address != address:
            self._group = WeightGroup(address, -1, torch.device("cpu"), reach_store(address))

    # -- weights -------------------------------------------------------------------------------------------------

    def _deliver(
        self, weights: Counted, listed: list[Listed], clients: Sequence[ServerClient], orders: Sequence[dict[str, Any]]
    ) -> None:
        """Tells this rank's servers, goes through the weights, and sends them if this is rank 0.

        Raises:
            ConnectionError: a server or another rank died.
            TimeoutError: one hangs.
            ValueError: a server refuses what was announced.
        """
        group = self._group
        assert group is not None
        threads = ThreadPoolExecutor(max(1, len(clients)))
        answers: list[Future[None]] = []
        try:
            for client, order in zip(clients, orders, strict=True):
                answers.append(threads.submit(client.order_weights, order))
                answers[-1].add_done_callback(_tell_failure(group))
            if group.rank == 0:
                self._broadcast(group, weights, listed)
            else:
                exhaust(weights)
        except BaseException as error:
            group.give_up(repr(error))
            group.close()  # so that workers do not wait for what will not come
            exhaust(weights)
            _raise_refusal(answers)
            raise
        finally:
            threads.shutdown(wait=False)
        for answer in answers:
            answer.result()

    def _broadcast(self, group: WeightGroup, weights: Counted, listed: list[Listed]) -> None:
        if not group.is_open:
            group.open()
        for bucket in cut_buckets(listed, self.bucket_bytes):
            buffer = empty_bucket(bucket, group.device)
            fill_bucket(buffer, bucket, weights)
            group.broadcast(buffer)
        name, _ = next(weights, ("", None))
        if name:
            raise RuntimeError(f"{name} comes after all weights that were announced to the servers")


def exhaust(weights: Iterator[object]) -> None:
    """Goes through what is left, as the other ranks do."""
    for _ in weights:
        pass


def _raise_refusal(answers: Sequence[Future[None]]) -> None:
    """Raises the ValueError of a server that refuses an order, which says more than what came of it."""
    done, _ = wait(answers, REFUSAL_S)  # one that hangs does not answer
    for answer in done:
        error = answer.exception()
        if isinstance(error, ValueError):
            raise error


def _tell_failure(group: WeightGroup) -> Callable[[Future[None]], None]:
    """Has the group know of a server that refuses or dies."""

    def tell(answer: Future[None]) -> None:
        error = answer.exception()
        if error is not None:
            group.give_up(str(error))

    return tell
