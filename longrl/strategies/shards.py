"""Checkpoints of several ranks: each writes its shards and their checksums, and any number of ranks reads them.

Lightning does the same with torch's own reader and writer, which unpickle whatever a checkpoint names and sum nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from typing_extensions import override

from longrl.io.checkpoint_files import META, check_files, load_file, load_shards, save_file
from longrl.io.checksums import Checksum, SummedFile, write_checksums
from longrl.strategies.axis import Axis


def check_by_ranks(path: Path, world: Axis) -> None:
    """`check_files` by all ranks: each reads a part of the shards, the first one a single file.

    Raises:
        ValueError: on all of them, whoever found something missing, torn or damaged.
    """
    with world.raise_on_any_rank():
        reads = path.is_dir() or world.rank == 0
        check_files(path, contents=reads, part=world.rank, num_parts=world.size)


def save_shards(checkpoint: dict[str, Any], folder: Path, world: Axis) -> None:
    """Writes a checkpoint's tensors by all ranks and the rest by the first; all is on the disk when it returns.

    Args:
        checkpoint: Lightning's; weights and optimizer states are taken out.
        folder: of the new checkpoint.
        world: all ranks.

    Raises:
        OSError: a rank could not write.
    """
    state = {"state_dict": checkpoint.pop("state_dict")}
    for index, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
        state[f"optimizer_{index}"] = optimizer
    writer = SummedWriter(folder)
    try:
        save(state, storage_writer=writer)
    except CheckpointException as error:
        raise writer.files.error or _cause(error) from error
    sums: dict[str, Checksum] = {}
    for of_rank in world.gather(writer.files.sums):
        sums |= of_rank
    with world.raise_on_any_rank():
        if world.rank == 0:
            save_file(checkpoint, folder / META)
            write_checksums(folder, sums)
            check_files(folder, contents=False)


def read_shards(module: nn.Module, optimizers: Sequence[Optimizer], folder: Path, *, strict: bool) -> dict[str, Any]:
    """Gives a sharded module and its optimizers what ranks of another run, or of this one, saved.

    Args:
        module: under the names of the checkpoint's weights.
        optimizers: of its parameters.
        folder: the checkpoint.
        strict: see `Module.load_state_dict`.

    Returns:
        The rest of the checkpoint.
    """
    weights = get_model_state_dict(module)
    load_shards({"state_dict": weights}, folder)
    module.load_state_dict(weights, strict=strict)
    for index, optimizer in enumerate(optimizers):
        # One after the other, so that only one is in memory twice.
        state = get_optimizer_state_dict(module, optimizer)
        load_shards({f"optimizer_{index}": state}, folder)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=state, options=StateDictOptions(cpu_offload=True))
    return cast(dict[str, Any], load_file(folder / META))


class SummedFiles(FileSystem):
    """Sums files while they are written, and has the system put them on the disk."""

    def __init__(self) -> None:
        self.sums: dict[str, Checksum] = {}
        """By name in the folder."""
        self.error: OSError | None = None
        """The first one of the system."""

    @override
    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = SummedFile(cast(Any, stream))
            try:
                yield summed
            finally:
                self.error = self.error or summed.error
        # torch syncs before what Python holds back is written.
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())
        # `.metadata` is renamed when it is whole.
        name = Path(path).name.removesuffix(".tmp")
        self.sums[name] = summed.checksum()


class SummedWriter(FileSystemWriter):
    """torch's writer of shards, one file per rank, over `SummedFiles`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = SummedFiles()
        self.fs = self.files


def _cause(error: CheckpointException) -> BaseException:
    """What failed on the first rank that did."""
    (cause, _), *_ = error.failures.values()
    return cause
