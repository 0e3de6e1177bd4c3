"""Media features on disk: a safetensors file per media item, found by key and provenance, and checked when it is read.

A file is whole or it is not there (`atomic_write`). What is torn, altered, or of another key or provenance counts as
absent, and is said. Any number of processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from longrl.features.provenance import tensor_bytes
from longrl.io.atomic import PARTIAL_SUFFIX, atomic_write

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
STALE_AFTER_S = 3600.0
"""A temporary file that nobody has written to for so long is what a killed writer left. A writer that hung longer finds
its file gone, and the features are encoded again when they are next asked for."""
RETRY_AFTER_S = 600.0
"""After a failed write nothing is written for so long."""
GIB = 1 << 30


class FeatureFiles:
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
        """Files that could not be used."""
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
        """Where the features of a media item are, or would be."""
        name = hashlib.sha256(f"{self.provenance}\n{key}".encode()).hexdigest()
        return self.folder / (name + SUFFIX)

    def has(self, key: str) -> bool:
        """Says whether there is a file, which `read` may still find broken."""
        return self.path(key).exists()

    def num_bytes(self) -> int:
        """Size of all files in the folder, whichever encoder they are of."""
        return sum(state.st_size for _, state in self._list_files())

    # -- reading and writing -------------------------------------------------------------------------------------

    def read(self, key: str) -> tuple[Tensor, float] | None:
        """[N, D] features of a media item and the seconds it took to make them, or None: then it is to be encoded."""
        path = self.path(key)
        try:
            features, encode_s = unpack_features(path.read_bytes(), {"key": key, "provenance": self.provenance})
        except FileNotFoundError:
            return None
        except Exception as error:  # what a damaged header raises has many types
            self.num_broken += 1
            logger.warning("%s cannot be used and is encoded again: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # evicted just now, or a folder to read only
            os.utime(path)
        return features, encode_s

    def write(self, key: str, features: Tensor, encode_s: float) -> int:
        """Stores [N, D] features, in place of what is there; a failure is no reason to stop a run.

        Returns:
            Bytes written: 0 if the disk is full, the folder cannot be written to, or the file alone is over the limit.
        """
        if time.monotonic() < self._paused_until:
            return 0
        content = pack_features({"key": key, "provenance": self.provenance}, features, encode_s)
        if len(content) > self.max_bytes:
            self._warn_once(
                f"features of {len(content) / GIB:.2f} GiB are not stored, for all files together may take "
                f"model.feature_cache_disk_bytes={self.max_bytes}; raise it",
                topic="limit",
            )
            return 0
        try:
            self._make_room(len(content))
            atomic_write(self.path(key), content)
        except OSError as error:
            self._paused_until = time.monotonic() + RETRY_AFTER_S
            self._warn_once(
                f"features cannot be written to model.feature_cache_dir={self.folder} ({error.strerror}): the run goes "
                f"on, reads what is there, encodes the rest and tries to write again every {RETRY_AFTER_S:.0f} s. Free "
                "space, lower model.feature_cache_disk_bytes, or name a folder that can be written to",
                topic="write",
            )
            return 0
        return len(content)

    def _make_room(self, num_bytes: int) -> None:
        """Removes the least recently used files until `num_bytes` fit."""
        if num_bytes <= self._may_write:
            self._may_write -= num_bytes
            return
        files = self._list_files()
        size = sum(state.st_size for _, state in files)
        for path, state in sorted(files, key=lambda file: (file[1].st_mtime_ns, file[0])):
            if size + num_bytes <= self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                os.unlink(path)
                self.num_evicted += 1
            size -= state.st_size
        if self.num_evicted:
            self._warn_once(
                f"model.feature_cache_dir={self.folder} is full (model.feature_cache_disk_bytes={self.max_bytes}): the "
                "least recently used features are removed for new ones. A limit below what one epoch needs saves "
                "little; raise it if there is room",
                topic="evicted",
            )
        # An eighth of what is left, for other processes write, too, before they measure again.
        self._may_write = max(0, self.max_bytes - size - num_bytes) // 8

    def _list_files(self) -> list[tuple[str, os.stat_result]]:
        """Path and state of every file of features; what killed writers left is removed on the way."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # evicted or renamed just now
                    if entry.name.endswith(SUFFIX):
                        files.append((entry.path, entry.stat()))
                    elif entry.name.endswith(PARTIAL_SUFFIX) and time.time() - entry.stat().st_mtime > STALE_AFTER_S:
                        os.unlink(entry.path)
        return files

    def _warn_once(self, text: str, topic: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(text)


# ------------------------------------------------------------------------------------------------------------- format


def pack_features(identity: dict[str, str], features: Tensor, encode_s: float) -> bytes:
    """The bytes of a file: safetensors, with all that identifies it and a checksum in its metadata."""
    from safetensors.torch import save

    tensor = features.detach().cpu().contiguous()
    metadata = identity | {"shape": str(list(tensor.shape)), "dtype": str(tensor.dtype), "encode_s": f"{encode_s:.6f}"}
    return save({"features": tensor}, metadata | {"sha256": _checksum(metadata, tensor)})


def unpack_features(content: bytes, identity: dict[str, str]) -> tuple[Tensor, float]:
    """The inverse of `pack_features`: features on the CPU and the seconds it took to make them.

    Raises:
        ValueError: it is of another media item or encoder, or its checksum is wrong; a torn header raises other errors.
    """
    from safetensors.torch import load

    header_bytes = int.from_bytes(content[:8], "little")
    metadata: dict[str, Any] = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
    tensor = load(content)["features"]
    expected = identity | {"shape": str(list(tensor.shape)), "dtype": str(tensor.dtype)}
    for name, value in expected.items():
        if metadata[name] != value:
            raise ValueError(f"its {name} is {metadata[name]!r} instead of {value!r}")
    if metadata.pop("sha256") != _checksum(metadata, tensor):
        raise ValueError("its checksum is wrong")
    return tensor, float(metadata["encode_s"])


def _checksum(metadata: dict[str, str], tensor: Tensor) -> str:
    """Sha256 of the metadata and of a contiguous CPU tensor's bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
