"""Is there a whole checkpoint at a path, and may it be read? Nothing that is read here can run code.

A checkpoint is a file of `torch.save`, or of several ranks a folder of shards: `*.distcp` with the tensors, `.metadata`
that says where each is, and `meta.pt` with all else. All of them are pickles, which can name any function of any
module. Files of `torch.save` are read by torch's unpickler with a list of what is allowed (`weights_only`); for
`.metadata` torch has none, so this file does (`METADATA_GLOBALS`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, Metadata, load
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import get_unsafe_globals_in_checkpoint
from typing_extensions import override

from longrl.io.atomic import atomic_file
from longrl.io.checksums import COPY_AGAIN, SummedFile, check_folder, check_zip

META = "meta.pt"
"""Lightning's name of the file of a sharded checkpoint that holds all but tensors."""
METADATA = ".metadata"
"""torch's name of the file that says what the shards hold."""
TRUST = "--trust_checkpoint true"
DTYPES = {name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)}
METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES},
    # The folder's name when it was saved.
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
"""All that a `.metadata` of torch names, by module: classes without behaviour, and the types of tensors."""

_trusts = False


def trust_checkpoints(trusted: bool = True) -> None:
    """Has this process read checkpoints that name other functions and classes, which may run any code."""
    global _trusts
    _trusts = trusted


def is_trusted() -> bool:
    """True after `trust_checkpoints`."""
    return _trusts


def check_checkpoint(path: str | Path, *, contents: bool = True) -> None:
    """Reads a checkpoint through: all of its files are there, hold what was written, and name no code.

    Args:
        path: a file of one rank, or a folder of shards.
        contents: as of `check_files`.

    Raises:
        ValueError: it cannot be loaded; the message says why in one line.

    Example:
        `check_checkpoint("runs/demo/checkpoints/last.ckpt")`
    """
    path = Path(path)
    check_files(path, contents=contents)
    if path.is_dir():
        load_file(path / META)
        read_metadata(path)
    else:
        load_state(path)


def check_files(path: Path, *, contents: bool = True, part: int = 0, num_parts: int = 1) -> None:
    """Compares a checkpoint's files with their checksums; those of shards saved before there were any only by size.

    Args:
        path: a file, or a folder of shards.
        contents: False checks that all is there, without reading it.
        part: with `num_parts`, reads a part of the files alone, as `checksums.check_folder`.
        num_parts: see `part`.

    Raises:
        ValueError: something is missing, torn or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a checkpoint that does")
    if not path.is_dir():
        check_zip(path, contents=contents)
        return
    for name in (META, METADATA):
        if not (path / name).is_file():
            raise ValueError(f"{path} is a folder and no whole checkpoint: it has no {name}; name a checkpoint")
    check_folder(path, contents=contents, part=part, num_parts=num_parts)
    check_zip(path / META, contents=contents)
    for entry in read_metadata(path).storage_data.values():
        shard = path / entry.relative_path
        size = shard.stat().st_size if shard.is_file() else 0
        if size < entry.offset + entry.length:
            raise ValueError(
                f"{shard} is torn or missing: it has {size} bytes, but the checkpoint reads "
                f"{entry.offset + entry.length}; {COPY_AGAIN}"
            )


def load_state(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint of one file; its tensors are read when they are used.

    Raises:
        ValueError: it is no such file, or names code.
    """
    content = load_file(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"{path} is no checkpoint of a run: it must be a dict with the weights as `state_dict`, got "
            f"{type(content).__name__} without; name one in RUN/checkpoints"
        )
    return content


def load_file(path: Path) -> Any:
    """What `torch.save` wrote, unless it names code; tensors lie in the file until they are used.

    Raises:
        ValueError: the file is none, or what it names is not on torch's list.
    """
    check_zip(path, contents=False)
    try:
        return torch.load(path, map_location="cpu", weights_only=not _trusts, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({_first_line(error)}); {COPY_AGAIN}") from error


def save_file(content: Any, path: Path) -> None:
    """Writes a checkpoint beside `path`, whole and on the disk, and renames: whoever is killed has the one before.

    Raises:
        OSError: the file could not be written; what stood there is as it was.
    """
    with atomic_file(path) as file:
        summed = SummedFile(file)
        try:
            torch.save(content, summed)
        except RuntimeError as error:  # of a full disk torch says "unexpected pos"
            raise summed.error or error from error
        file.flush()
        check_zip(Path(file.name), contents=False)


@contextlib.contextmanager
def explained_failure(path: Path) -> Iterator[None]:
    """Says of what the system refuses which checkpoint it was, and what is to be done, in one line.

    Raises:
        ValueError: instead of an OSError inside the block.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(_not_written(path, error)) from error


def _not_written(path: Path, error: OSError) -> str:
    said = error.strerror or str(error)
    remedy = "make the folder writable, or name another --run_dir"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, or name a --run_dir on another disk"
        with contextlib.suppress(OSError):
            said += f", {shutil.disk_usage(path.parent).free / 2**30:.1f} GiB are left"
    kept = f"; the one before is kept: go on with --ckpt_path {path}" if path.exists() else ""
    return f"the checkpoint {path} could not be written ({said}); {remedy}{kept}"


def refusal(path: Path, error: Exception, content: io.BytesIO | None = None) -> str:
    """Says what a file of `torch.save` names that may not be read, or that it is damaged.

    Args:
        path: the file, for the message.
        error: of torch's unpickler.
        content: what was read, where it is not all of the file.
    """
    try:
        named = get_unsafe_globals_in_checkpoint(content or path)
    except (RuntimeError, pickle.UnpicklingError, ValueError, KeyError, IndexError, EOFError, OSError):
        named = []
    if named:
        return _refused(path, ", ".join(named[:3]))
    return f"{path} is damaged or no checkpoint ({_first_line(error)}); {COPY_AGAIN}"


def _refused(path: Path, names: str) -> str:
    return (
        f"{path} is refused: reading it would import {names}, which tensors and plain values do not need and which may "
        f"run any code; only if you know who wrote it, append {TRUST}"
    )


def read_metadata(folder: Path) -> Metadata:
    """What the shards in a folder hold, and where, read without running code.

    Raises:
        ValueError: it names something else than `METADATA_GLOBALS`, is damaged, or points out of its folder.
    """
    path = folder / METADATA
    try:
        unpickler = pickle.Unpickler if _trusts else MetadataUnpickler
        metadata = unpickler(io.BytesIO(path.read_bytes())).load()
    except RefusedGlobalError as error:
        raise ValueError(_refused(path, str(error))) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged or missing ({_first_line(error)}); {COPY_AGAIN}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path} is damaged: it holds no list of shards; {COPY_AGAIN}")
    for entry in metadata.storage_data.values():
        name = getattr(entry, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path} is refused: shards must lie beside it, got {name!r}; {COPY_AGAIN}")
    return metadata


class RefusedGlobalError(Exception):
    """The name of a function or class that is not to be read."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads what `.metadata` consists of, and no other function or class."""

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in METADATA_GLOBALS.get(module_name, ()):
            raise RefusedGlobalError(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class SafeReader(FileSystemReader):
    """Reads shards as torch's own, but for `.metadata`, which torch unpickles whatever it names."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Refuses values beside tensors that name code, which torch's own unpickles (`weights_only=False`)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if not _trusts:
            content = io.BytesIO(value.getvalue())
            try:
                torch.load(content, weights_only=True)
            except pickle.UnpicklingError as error:
                content.seek(0)
                raise ValueError(refusal(self.folder, error, content)) from error
        super().load_bytes(read_item, value)


def load_shards(state: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fills the tensors of a state from a folder of shards, as `torch.distributed.checkpoint.load`.

    Args:
        state: whose tensors are filled, each rank its own shards.
        folder: of a checkpoint.
        alone: this process asks for itself, whatever others do.

    Raises:
        ValueError: the shards are damaged, lack what the state has, or name code.
    """
    try:
        load(state, storage_reader=SafeReader(folder), planner=SafePlanner(folder), no_dist=alone)
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        if isinstance(cause, ValueError) and str(cause).startswith(str(folder)):
            raise ValueError(str(cause)) from error
        if isinstance(cause, RuntimeError | ValueError) and str(cause).startswith(("Missing key", "Size mismatch")):
            raise ValueError(
                f"{folder} holds another model or optimizer than this run has ({_first_line(cause)}); go on with the "
                "config that it was saved with"
            ) from error
        raise ValueError(f"{folder} cannot be read ({_first_line(cause)}); {COPY_AGAIN}") from error


def _first_line(error: BaseException) -> str:
    """What an error says, without torch's pages of advice."""
    text = str(error).strip().partition("\n")[0]
    return text[:200] or type(error).__name__
