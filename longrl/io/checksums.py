"""Checksums of files: one changed byte of weights is found when they are read, not in the curves of a run.

The sum is CRC-32. It has to find damage (a disk, a copy that broke off, two writers of one file), not an attacker, who
could write the sums anew; and it costs a third of blake2b: about 3 GB/s on one core here. The zip files
that `torch.save` writes carry it of every tensor already, so a file of one checkpoint needs nothing beside it.
"""

from __future__ import annotations

import functools
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from longrl.io.atomic import atomic_write
from longrl.io.pulse import PULSE

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""File of a folder that has size and sum of the others."""
CHUNK_BYTES = 1 << 22
COPY_AGAIN = "copy it again, or use an earlier checkpoint"


@dataclass(frozen=True)
class Checksum:
    """What a file held when it was written."""

    bytes: int
    crc32: str
    """8 hexadecimal digits."""


class SummedFile:
    """A file being written in one go, which sums what passes; what else is asked of it the file itself answers.

    It keeps the first error of the system: `torch.save` of a full disk ends with another one, which says nothing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None
        self._bytes = 0
        self._crc = 0

    def write(self, data: Any) -> int:
        """Writes and sums; see `BinaryIO.write`."""
        view = memoryview(data).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        PULSE.beats += 1
        self._crc = zlib.crc32(view, self._crc)
        self._bytes += len(view)
        return len(view)

    def checksum(self) -> Checksum:
        """Of what was written so far."""
        return Checksum(self._bytes, f"{self._crc:08x}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def file_checksum(path: Path) -> Checksum:
    """Size and sum of a file, which is read once."""
    size = 0
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            PULSE.beats += 1
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return Checksum(size, f"{crc:08x}")


def write_checksums(folder: Path, known: Mapping[str, Checksum] | None = None, pattern: str = "*") -> None:
    """Writes `checksums.json` of the files in a folder and below it.

    Args:
        folder: whose files are complete.
        known: sums from when files were written, by their names in the folder; the others are read.
        pattern: of the names of those that count.
    """
    known = known or {}
    sums = {}
    for file in sorted(folder.rglob(pattern)):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != CHECKSUMS:
            sums[name] = asdict(known.get(name) or file_checksum(file))
    content = {"algorithm": "crc32", "files": sums}
    atomic_write(folder / CHECKSUMS, json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """The sums in a folder's `checksums.json` by file; None, and said once, where there is none.

    Raises:
        ValueError: the file is none of `write_checksums`.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        _tell_unsummed(str(folder))
        return None
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: Checksum(int(sums["bytes"]), str(sums["crc32"])) for name, sums in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): it must hold size and sum of each file; {COPY_AGAIN}"
        ) from error


@functools.cache
def _tell_unsummed(folder: str) -> None:
    logger.info("%s has no %s, so damage of its files would not be noticed; older ones have none", folder, CHECKSUMS)


def check_folder(folder: Path, *, contents: bool = True, part: int = 0, num_parts: int = 1) -> None:
    """Compares the files of a folder with its `checksums.json`; does nothing without one.

    Args:
        folder: of shards, or exported.
        contents: False compares sizes alone, which takes no time.
        part: with `num_parts`, reads every `num_parts`-th file alone: ranks share the reading.
        num_parts: see `part`.

    Raises:
        ValueError: the first file that is missing or differs.
    """
    sums = read_checksums(folder) or {}
    for index, (name, expected) in enumerate(sorted(sums.items())):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing, which its {CHECKSUMS} names; {COPY_AGAIN}")
        size = file.stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{file} is torn: it has {size} bytes of {expected.bytes} written; {COPY_AGAIN}")
        if contents and index % num_parts == part:
            found = file_checksum(file).crc32
            if found != expected.crc32:
                raise ValueError(
                    f"{file} is damaged: its content has checksum {found}, {expected.crc32} was written; {COPY_AGAIN}"
                )


def check_zip(path: Path, *, contents: bool = True) -> None:
    """Compares a file of `torch.save` with the sums within it.

    Args:
        path: the file.
        contents: False looks whether its directory is there, which is written last.

    Raises:
        ValueError: it is empty, torn, damaged, or no such file.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: 0 bytes are no checkpoint; {COPY_AGAIN}")
    # A directory, the offset of each entry and the headers: a file cut anywhere has none.
    try:
        with zipfile.ZipFile(path) as archive:
            bad = _first_bad_entry(archive) if contents else None
            # torch leaves the memory of an entry that calls itself a folder as it found it, without an error.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = bad or next(iter(folders), None)
            problem = damaged and f"the content of {damaged} is not what was written"
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} {_not_whole(path, error)}; {COPY_AGAIN}") from error
    # What a changed directory leads to: seeks before the file's begin, passwords, methods that there are not.
    except (ValueError, EOFError, NotImplementedError, RuntimeError, OverflowError, OSError, zlib.error) as error:
        problem = f"{error}"
    if problem:
        raise ValueError(f"{path} is damaged: {problem}; {COPY_AGAIN}")


def _first_bad_entry(archive: zipfile.ZipFile) -> str | None:
    """As `testzip`, but a watchdog sees that it goes on."""
    for entry in archive.infolist():
        try:
            with archive.open(entry) as file:
                while file.read(CHUNK_BYTES):
                    PULSE.beats += 1
        except zipfile.BadZipFile:
            return entry.filename
    return None


def _not_whole(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        is_begun = file.read(4) == b"PK\x03\x04"
    if is_begun:
        return f"is torn or damaged ({error})"
    return "is no checkpoint: it does not begin as a file of torch.save does"
