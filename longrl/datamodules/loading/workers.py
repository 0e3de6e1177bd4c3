"""Processes that render rows for a loader: what they hand over and how, and what happens when they cannot."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from longrl.io.processes import LostWorker, lost_worker_in
from longrl.io.pulse import PULSE
from longrl.types import Prompt, Row

logger = logging.getLogger(__name__)

SHARED_BYTES = 1 << 20
"""A worker hands larger tensors over in shared memory, where nothing copies them."""
SHARED_FOLDER = Path("/dev/shm")
WAIT_FOR_ROOM_S = 30.0
"""So long a worker waits for room in shared memory, which the trainer makes as it reads."""
MIB = 1 << 20
REMEDY = (
    "Enlarge it (docker run --shm-size=16g or --ipc=host), lower data.num_workers, data.prefetch_prompts or "
    "data.max_held_mib, or set data.num_workers=0, which needs none"
)


class SharedMemoryFull(ValueError):
    """A worker cannot hand over what it rendered."""


def end_with_trainer(worker: int) -> None:
    """In a worker: leave when the trainer is killed. PyTorch's own check ends no worker that writes to a full pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class IPCPayload:
    """An item on its way from a worker. Every shared tensor keeps a file open, so small ones travel in the pickle."""

    pickled: bytes
    shared: list[Tensor]

    @classmethod
    def pack(cls, item: object) -> IPCPayload:
        """In the worker."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(item)
        return cls(buffer.getvalue(), pickler.shared)

    @classmethod
    def pack_shared(cls, item: object) -> IPCPayload:
        """In the worker: packs, and puts into shared memory what goes there; an error about it goes instead.

        PyTorch would do it in a thread of the queue, which drops what does not fit, and the trainer waits for ever.
        """
        payload = cls.pack(item)
        try:
            for tensor in payload.shared:
                put_into_shared_memory(tensor)
        except SharedMemoryFull as error:
            return cls.pack(error)
        return payload

    def pin_memory(self) -> PinnedItem:
        """In the trainer's process, where it has a GPU; PyTorch's loader calls it in a thread of its own."""
        item = self._load()
        return PinnedItem(item.pin_memory() if isinstance(item, Prompt) else item)

    def unpack(self) -> Any:
        """In the trainer's process.

        Raises:
            SharedMemoryFull: the worker had no room for it.
        """
        return PinnedItem(self._load()).unpack()

    def _load(self) -> Any:
        return _Unpickler(self.pickled, self.shared).load()


@dataclass(frozen=True)
class PinnedItem:
    """An item that has arrived; patches of a prompt are in pinned memory."""

    item: Any

    def unpack(self) -> Any:
        """As of `IPCPayload`."""
        if isinstance(self.item, SharedMemoryFull):
            raise self.item
        return self.item


class _Pickler(pickle.Pickler):
    """Leaves large tensors out, as numbers of `shared`. By a method: Python 3.13.0 lets no instance be given one."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.shared: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor) or value.nbytes <= SHARED_BYTES:
            return None
        self.shared.append(value)
        return len(self.shared) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, pickled: bytes, shared: list[Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self.shared = shared

    def persistent_load(self, number: int) -> Tensor:
        return self.shared[number]


def put_into_shared_memory(tensor: Tensor) -> None:
    """Moves a tensor there, once there is room.

    Raises:
        SharedMemoryFull: there is none in time.
    """
    deadline = time.monotonic() + WAIT_FOR_ROOM_S
    while tensor.nbytes > free_shared_bytes():  # a page that finds no room kills the process (SIGBUS)
        if time.monotonic() > deadline:
            raise SharedMemoryFull(_full_message(tensor.nbytes))
        time.sleep(0.05)
    try:
        tensor.share_memory_()
    except RuntimeError as error:
        raise SharedMemoryFull(f"{_full_message(tensor.nbytes)} ({str(error).splitlines()[0]})") from error


def free_shared_bytes() -> float:
    """Room in shared memory; without end where it is not a folder."""
    return shutil.disk_usage(SHARED_FOLDER).free if SHARED_FOLDER.is_dir() else float("inf")


def warn_of_small_shared_memory(num_items: int, item_bytes: float) -> None:
    """Says before the first step that shared memory may be too small: videos may all be shorter than the config allows.

    Args:
        num_items: that workers may hold at once.
        item_bytes: of the largest one.
    """
    needed = num_items * item_bytes
    if needed <= free_shared_bytes():
        return
    logger.warning(
        "loader workers hold up to %d prompts of at most %.0f MiB in shared memory (%s), which has %.0f of these %.0f "
        "MiB free; if the longest videos come together the run ends. %s",
        num_items, item_bytes / MIB, SHARED_FOLDER, free_shared_bytes() / MIB, needed / MIB, REMEDY,
    )  # fmt: skip


def _full_message(num_bytes: int) -> str:
    size = shutil.disk_usage(SHARED_FOLDER).total if SHARED_FOLDER.is_dir() else 0
    return (
        f"a loader worker has {num_bytes / MIB:.0f} MiB to hand over, but shared memory ({SHARED_FOLDER}, "
        f"{size / MIB:.0f} MiB) has {free_shared_bytes() / MIB:.0f} MiB free. {REMEDY}"
    )


def items_of_workers(parcels: DataLoader[Any], rows: Sequence[Row], drawn: deque[int]) -> Iterator[Any]:
    """What workers hand over, in the order drawn; as long as it is read the watchdog sees that they live.

    Args:
        parcels: of `IPCPayload` or `PinnedItem`.
        rows: of the data set.
        drawn: rows that were drawn and not handed over yet; the first one is waited for.

    Raises:
        LostWorker: a worker died.
        SharedMemoryFull: a worker found no room.
    """
    iterator = iter(parcels)
    names = {process.pid: f"loader worker {number}" for number, process in enumerate(iterator._workers)}  # type: ignore[attr-defined]
    PULSE.workers |= names
    try:
        while True:
            if drawn:
                PULSE.sample = rows[drawn[0]].id
            try:
                payload = next(iterator)
            except StopIteration:
                return
            drawn.popleft()
            PULSE.beats += 1
            yield payload.unpack()
    except RuntimeError as error:
        lost = lost_worker_in(error)
        if lost is None:
            raise
        raise LostWorker(lost) from error
    finally:
        for pid in names:
            PULSE.workers.pop(pid, None)
