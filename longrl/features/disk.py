"""Media features on disk: one safetensors file per medium, found by key and provenance, and checked when it is read.

A file is whole or it is not there: it is written beside its place, flushed to disk and renamed. What is torn, altered,
or of another key or provenance counts as absent, and is said. Any number of processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrl.io.atomic import PARTIAL_SUFFIX, atomic_write

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
STALE_AFTER_S = 3600.0
"""A temporary file that nobody has written to for so long is what a killed writer left. A writer that hung longer finds
its file gone, and the features are encoded again when they are next asked for."""
RETRY_AFTER_S = 600.0
"""After a failed write nothing is written for so long."""
GIB = 1 << 30


@dataclass(frozen=True)
class Stored:
    """What a file holds."""

    features: Tensor
    """[N, D] on the CPU."""
    encode_s: float
    """Seconds it took to make them."""
    num_bytes: int
    """Of the file."""


class DiskCache:
    """Features of one encoder in a folder that several encoders, runs and machines may share.

    Args:
        folder: made if it is not there.
        provenance: of the encoder, see `longrl.features.provenance`; files of another are as good as absent.
        max_bytes: of all files in the folder; the least recently used go first.

    Raises:
        ValueError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | Path, provenance: str, max_bytes: int) -> None:
        self.folder = Path(folder).expanduser()
        self.provenance = provenance
        self.max_bytes = max_bytes
        self.num_broken = 0
        """Files found that could not be used."""
        self.num_evicted = 0
        """Files removed to make room."""
        self._may_write = 0
        """Bytes that may be written before the folder is measured again: other processes write too."""
        self._paused_until = 0.0
        self._warned: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            next(os.scandir(self.folder), None)
        except OSError as error:
            raise ValueError(
                f"model.feature_cache_dir must be a folder that can be made and read, got {str(folder)!r} "
                f"({error.strerror}); name another, or leave the option out"
            ) from error

    def path(self, key: str) -> Path:
        """Where the features of a medium are, or would be."""
        name = hashlib.sha256(f"{self.provenance}\n{key}".encode()).hexdigest()
        return self.folder / (name + SUFFIX)

    def has(self, key: str) -> bool:
        """Whether there is a file, which `read` may still find broken."""
        return self.path(key).exists()

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, key: str) -> Stored | None:
        """What was stored under a media key, or None: then it is to be encoded."""
        path = self.path(key)
        try:
            data = path.read_bytes()
            stored = unpacked(data, {"key": key, "provenance": self.provenance})
        except FileNotFoundError:
            return None
        except Exception as error:  # what a damaged header raises has many types
            self.num_broken += 1
            logger.warning("%s cannot be used and is encoded again: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # evicted just now, or a folder to read only
            os.utime(path)
        return stored

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, key: str, features: Tensor, encode_s: float) -> int:
        """Stores [N, D] features, in place of what is there; whether it worked is no reason to stop a run.

        Returns:
            Bytes written: 0 if the disk is full, the folder cannot be written to, or the file alone is over the limit.
        """
        if time.monotonic() < self._paused_until:
            return 0
        data = packed({"key": key, "provenance": self.provenance}, features, encode_s)
        if len(data) > self.max_bytes:
            self._warn_once(
                "limit",
                f"features of {len(data) / GIB:.2f} GiB are not stored, for all files together may take "
                f"model.feature_cache_disk_bytes={self.max_bytes}; raise it",
            )
            return 0
        try:
            self._make_room(len(data))
            atomic_write(self.path(key), data)
        except OSError as error:
            self._pause(error)
            return 0
        return len(data)

    def _pause(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + RETRY_AFTER_S
        self._warn_once(
            "write",
            f"features cannot be written to model.feature_cache_dir={self.folder} ({error.strerror}): the run goes on, "
            f"reads what is there, encodes the rest and tries to write again every {RETRY_AFTER_S:.0f} s. Free space, "
            "lower model.feature_cache_disk_bytes, or name a folder that can be written to",
        )

    def _warn_once(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(text)

    # -- the limit -----------------------------------------------------------------------------------------------

    def _make_room(self, wanted: int) -> None:
        """Removes the least recently used files until `wanted` bytes fit."""
        if wanted <= self._may_write:
            self._may_write -= wanted
            return
        files = self._files()
        size = sum(file.st_size for _, file in files)
        for path, file in sorted(files, key=lambda found: (found[1].st_mtime_ns, found[0])):
            if size + wanted <= self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                os.unlink(path)
                self.num_evicted += 1
            size -= file.st_size
        if self.num_evicted:
            self._warn_once(
                "evicted",
                f"model.feature_cache_dir={self.folder} is full (model.feature_cache_disk_bytes={self.max_bytes}): the "
                "least recently used features are removed for new ones. A limit below what one epoch needs saves "
                "little; raise it if there is room",
            )
        self._may_write = max(0, self.max_bytes - size - wanted) // 8

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """Path and state of every file of features; what killed writers left is removed on the way."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # evicted or renamed just now
                    if entry.name.endswith(SUFFIX):
                        found.append((entry.path, entry.stat()))
                    elif entry.name.endswith(PARTIAL_SUFFIX) and time.time() - entry.stat().st_mtime > STALE_AFTER_S:
                        os.unlink(entry.path)
        return found

    def num_bytes(self) -> int:
        """Of all files in the folder, whichever encoder they are of."""
        return sum(file.st_size for _, file in self._files())


# ------------------------------------------------------------------------------------------------------------- format


def packed(identity: dict[str, str], features: Tensor, encode_s: float) -> bytes:
    """The bytes of a file: safetensors, with all that identifies it and a checksum in its metadata."""
    from safetensors.torch import save

    tensor = features.detach().cpu().contiguous()
    metadata = identity | {
        "shape": str(list(tensor.shape)),
        "dtype": str(tensor.dtype),
        "encode_s": f"{encode_s:.6f}",
    }
    return save({"features": tensor}, metadata | {"sha256": checksum(metadata, tensor)})


def unpacked(data: bytes, identity: dict[str, str]) -> Stored:
    """The inverse of `packed`.

    Raises:
        ValueError: it is another medium's or encoder's, or its checksum is wrong; a torn header raises other errors.
    """
    from safetensors.torch import load

    header_bytes = int.from_bytes(data[:8], "little")
    metadata: dict[str, Any] = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    tensor = load(data)["features"]
    expected = identity | {"shape": str(list(tensor.shape)), "dtype": str(tensor.dtype)}
    for name, value in expected.items():
        if metadata[name] != value:
            raise ValueError(f"its {name} is {metadata[name]!r} instead of {value!r}")
    if metadata.pop("sha256") != checksum(metadata, tensor):
        raise ValueError("its checksum is wrong")
    return Stored(tensor, float(metadata["encode_s"]), len(data))


def checksum(metadata: dict[str, str], tensor: Tensor) -> str:
    """Sha256 of the metadata and of a contiguous CPU tensor's bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
