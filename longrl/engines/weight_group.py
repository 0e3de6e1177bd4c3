"""A process group beside the run's own: rank 0 of the trainer sends, the workers of its servers receive.

It is made of torch.distributed's parts, a store and a backend (NCCL between GPUs, gloo between CPUs), for members come
and go while the run's group stays. All that waits here has an end: a member that fails says so in the store, one that
dies closes its connections, one that hangs costs `timeout_s`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

FAILED = "failed"
"""Key of the store under which a member says why it gave up."""
POLL_S = 0.2
"""How often a member that waits looks whether another one gave up."""
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class GroupAddress:
    """Where members of a group meet, and how many they are; an order brings it to the servers."""

    name: str
    """Of this group alone."""
    host: str
    """Of rank 0's store, as servers reach it."""
    port: int
    size: int
    """Members, rank 0 included."""
    backend: str
    """`nccl` or `gloo`."""
    timeout_s: float
    """Of one message, and of all members' coming together."""

    as_json = asdict

    @classmethod
    def from_json(cls, given: object) -> GroupAddress:
        """The address in an order.

        Raises:
            ValueError: it is none.
        """
        kinds: dict[str, Any] = {
            "name": str,
            "host": str,
            "port": int,
            "size": int,
            "backend": str,
            "timeout_s": (int, float),
        }
        if not isinstance(given, dict) or given.keys() != kinds.keys():
            raise ValueError(f"the group of a broadcast must have {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(given[name], kind):
                raise ValueError(f"{name} of a broadcast's group is {str(given[name])[:100]!r}")
        if given["backend"] not in ("nccl", "gloo"):
            raise ValueError(f"backend of a broadcast's group must be nccl or gloo, got {given['backend'][:100]!r}")
        return cls(**given)


def open_store(host: str, port: int, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """Rank 0's store, which listens at `host` alone, and its port.

    Args:
        host: address of this machine.
        port: 0 is a free one.
        timeout_s: of its answers.

    Raises:
        ValueError: nothing can listen there.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"weights cannot be sent from {host}:{port} ({error}); transfer_host of VLLMServerEngine must be an "
            "address of rank 0's machine that the servers reach, transfer_port a free port or 0"
        ) from error
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
        use_libuv=False,  # which would listen at a port of its own choice
    )
    return store, port


def reach_store(address: GroupAddress) -> dist.TCPStore:
    """Rank 0's store, for others.

    Raises:
        ConnectionError: it is not reached.
    """
    try:
        return dist.TCPStore(address.host, address.port, timeout=timedelta(seconds=address.timeout_s))
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(
            f"the trainer's rank 0 is not reached at {address.host}:{address.port} ({error}); set transfer_host of "
            "VLLMServerEngine to an address that the servers reach"
        ) from error


class WeightGroup:
    """A member of the group.

    Args:
        address: where the members meet.
        rank: 0 sends.
        device: of what is sent; NCCL's is a GPU.
        store: of `open_store` or `reach_store`.
    """

    def __init__(self, address: GroupAddress, rank: int, device: torch.device, store: dist.Store) -> None:
        self.address = address
        self.rank = rank
        self.device = device
        self._server_store = store  # a prefix alone would not keep it
        self.store = dist.PrefixStore(address.name, store)
        self._group: Any = None

    @property
    def is_open(self) -> bool:
        """True once all members have come."""
        return self._group is not None

    def open(self) -> None:
        """Waits for all members.

        Raises:
            ConnectionError: one gave up.
            TimeoutError: one does not come.
        """
        result: Future[Any] = Future()

        def run() -> None:
            try:
                result.set_result(self._connect())
            except BaseException as error:
                result.set_exception(error)

        # NCCL cannot be told to stop waiting for a member: then this thread waits, and nobody for it
        threading.Thread(target=run, daemon=True).start()
        self._wait(result.done)
        self._group = self._named(result.result)

    def _connect(self) -> Any:
        timeout = timedelta(seconds=self.address.timeout_s)
        members = dist.PrefixStore("members", self.store)
        group: Any
        if self.address.backend == "gloo":
            group = dist.ProcessGroupGloo(members, self.rank, self.address.size, timeout)
        else:
            torch.cuda.set_device(self.device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            with _no_watchdog():
                group = dist.ProcessGroupNCCL(members, self.rank, self.address.size, options)
        first = torch.zeros(1, device=self.device)
        group.broadcast(first, 0).wait()  # NCCL's members meet in their first message
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return group

    def broadcast(self, buffer: Tensor) -> None:
        """Fills a buffer of every member with rank 0's.

        Raises:
            ConnectionError: a member died or gave up.
            TimeoutError: one hangs.
        """
        work = self._named(lambda: self._group.broadcast(buffer, 0))
        self._wait(work.is_completed)
        self._named(work.wait)

    def give_up(self, reason: str) -> None:
        """Tells all members that nothing more will come from this one."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            if not self.store.check([FAILED]):
                self.store.set(FAILED, reason[:500])

    def close(self) -> None:
        """Ends this member; its connections close, also in the middle of a message."""
        group, self._group = self._group, None
        if group is not None and self.address.backend == "nccl":
            group.abort()

    def check(self) -> None:
        """Raises ConnectionError if a member gave up, or rank 0 died."""
        if self._named(lambda: self.store.check([FAILED])):
            reason = self.store.get(FAILED).decode(errors="replace")
            raise ConnectionError(f"weights were not sent on: {reason}")

    def _wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.address.timeout_s
        next_check = time.monotonic() + POLL_S
        while not is_done():
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(
                    f"a member of the group that weights are sent in did not answer for {self.address.timeout_s:g} s; "
                    "raise transfer_timeout_s of VLLMServerEngine if the network is slow, or look into the servers' log"
                )
            if now > next_check:
                self.check()
                next_check = now + POLL_S
            time.sleep(0.0005)

    def _named(self, call: Callable[[], ResultT]) -> ResultT:
        """What a call to the group gives; torch raises a RuntimeError for all that goes wrong between members."""
        try:
            return call()
        except RuntimeError as error:
            reason = f"a member of the group died: {error}"
            with contextlib.suppress(RuntimeError):
                if self.store.check([FAILED]):  # it says why before it closes its connections
                    reason = self.store.get(FAILED).decode(errors="replace")
            raise ConnectionError(f"weights were not sent on: {reason}") from error


@contextlib.contextmanager
def _no_watchdog() -> Iterator[None]:
    """An error of this group is its own: by default NCCL's watchdog would end the whole process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read as a group is made
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
