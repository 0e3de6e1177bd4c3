"""Ways of weights from the trainer to rollout servers."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from longrl.engines.server_client import ServerClient
from longrl.engines.vllm_extension import write_shards
from longrl.engines.weight_files import new_folder
from longrl.strategies.axis import world_axis


class WeightSender(Protocol):
    """A way of weights to servers."""

    kept: tuple[Path, str] | None
    """The folder of the last weights and their version, for servers that come back; None where no files are kept."""

    def send(
        self,
        weights: Iterator[tuple[str, Tensor]],
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Has servers hold the weights. Every rank of the run calls it, and an error of any is one of all.

        Args:
            weights: `engine_weights`, which every rank must go through.
            clients: of the servers that this rank tells; those of all ranks are all that there are.
            version: what the servers are to call them.
            pause: entered while servers take them over; no request is under way inside.
        """


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
        weights: Iterator[tuple[str, Tensor]],
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """See `WeightSender.send`."""
        world = world_axis()
        self.close()
        with self._new_folder(version) as folder:
            with world.raise_on_any_rank():
                try:
                    write_shards(weights, folder if world.rank == 0 else None, self.shard_mib << 20)
                except Exception as error:  # a full disk is an OSError or safetensors' own
                    for _ in weights:  # the other ranks are still gathering
                        pass
                    raise OSError(
                        f"could not write weights to {folder}: {error}; choose another weights_folder"
                    ) from error
            with pause(), world.raise_on_any_rank():
                for client in clients:
                    client.load_weights(str(folder), version)

    def close(self) -> None:
        """Deletes what is kept."""
        self.kept = None
        if self._delete is not None:
            self._delete()

    @contextlib.contextmanager
    def _new_folder(self, version: str) -> Iterator[Path]:
        """A folder of rank 0, under one name on all ranks; gone afterwards unless it is kept."""
        world = world_axis()
        name = ""
        with world.raise_on_any_rank():
            if world.rank == 0:
                name = str(new_folder(self.folder))
        folder = Path(world.gather(name)[0])
        if world.rank == 0:
            self._delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            yield folder
        except BaseException:
            self.close()
            raise
        if self.keeps:
            self.kept = (folder, version)
        else:
            self.close()
