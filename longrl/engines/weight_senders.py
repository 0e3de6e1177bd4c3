"""Ways of weights from the trainer to rollout servers."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from longrl.engines.server_client import ServerClient
from longrl.engines.vllm_extension import write_shards
from longrl.engines.weight_files import new_folder
from longrl.engines.weight_stream import WeightStream
from longrl.strategies.axis import world_axis


class WeightSender(Protocol):
    """A way of weights to servers."""

    kept: tuple[Path, str] | None
    """The folder of the last weights and their version, for servers that come back; None where no files are kept."""

    def send(
        self,
        weights: WeightStream,
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> int:
        """Has servers hold the weights. Every rank of the run calls it, and an error of any is one of all.

        After an error it may be called again, with fewer servers or with others.

        Args:
            weights: which every rank goes through once.
            clients: of the servers that this rank tells; those of all ranks are all that there are.
            version: what the servers are to call them.
            pause: entered while servers take them over, perhaps within another; no request is under way inside.

        Returns:
            Bytes that rank 0 sent or wrote, however many servers read them.
        """

    def close(self) -> None:
        """Lets go of what is kept between two sets of weights."""


class FileSender:
    """Weights as files, in shared memory on one machine or in a folder that trainer and servers share.

    All ranks gather, rank 0 writes; then the servers are told to load.

    Args:
        folder: seen by server and trainer under this name; it needs room for one set of weights.
        shard_mib: size of its files, which bounds the host memory of a sync.
        keeps: the files stay until the next ones are written, so that a server that comes back can have them.
    """

    def __init__(self, folder: Path, shard_mib: int, keeps: bool = False) -> None:
        self.folder = folder
        self.shard_mib = shard_mib
        self.keeps = keeps
        self.kept: tuple[Path, str] | None = None
        self._delete: Callable[[], object] | None = None

    def send(
        self,
        weights: WeightStream,
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> int:
        """See `WeightSender.send`."""
        world = world_axis()
        self.close()  # before there are others: the folder has room for one set
        counted = Counted(weights)
        with contextlib.ExitStack() as after:
            folder = after.enter_context(shared_folder(self.folder))
            with world.raise_on_any_rank(), all_gathered(counted, folder):
                write_shards(counted, folder if world.rank == 0 else None, self.shard_mib << 20)
            with pause(), world.raise_on_any_rank():
                for client in clients:
                    client.load_weights(str(folder), version)
            if self.keeps:
                self.kept = (folder, version)
                self._delete = weakref.finalize(self, after.pop_all().close)  # at the end of the process, too
        return counted.num_bytes

    def close(self) -> None:
        """Deletes what is kept."""
        self.kept = None
        if self._delete is not None:
            self._delete()
            self._delete = None


class Counted:
    """An iterator over weights that knows their bytes so far."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = iter(weights)
        self.num_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, weight = next(self._weights)
        self.num_bytes += weight.nbytes
        return name, weight


@contextlib.contextmanager
def all_gathered(weights: Iterator[object], folder: Path) -> Iterator[None]:
    """Has a rank that fails to write go through what is left of the weights: the others are still gathering.

    Raises:
        OSError: for any error inside; a full disk is an OSError or safetensors' own.
    """
    try:
        yield
    except Exception as error:
        for _ in weights:
            pass
        raise OSError(f"could not write weights to {folder}: {error}; choose another weights_folder") from error


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """A folder of rank 0, under one name on all ranks, gone afterwards."""
    world = world_axis()
    name = ""
    with world.raise_on_any_rank():
        if world.rank == 0:
            name = str(new_folder(parent))
    folder = Path(world.gather(name)[0])
    try:
        yield folder
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
