"""Files that only grow: what was paid for is on disk before it is used, and survives kill -9.

Every process appends to a file of its own, so that any number may share a folder; all files are read at the start. A
line that a killed process left half is not read. Lines are never changed, so nothing that a server said is lost.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longrl.io.jsonl import parse_json

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
Entry = dict[str, Any]


class AppendLog:
    """Records under keys in a folder, the first of a key counts.

    Args:
        folder: made at the first record.

    Example:
        ```python
        log = AppendLog("out/responses")
        log.append("7f3a", {"response": ...})   # on disk when it returns
        log["7f3a"]
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.num_torn = 0
        """Lines that a killed process left half."""
        self._locations: dict[str, tuple[Path, int, int]] = {}
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def read(self) -> Iterator[Entry]:
        """All entries on disk, those without a key (failures) too; afterwards their keys are known."""
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            start = 0
            with path.open("rb") as file:
                for line in file:
                    entry = _parsed(line)
                    if entry is None:
                        self.num_torn += 1
                    else:
                        self._remember(entry, path, start, len(line))
                        yield entry
                    start += len(line)
        if self.num_torn:
            logger.info("%s: %d lines that a killed process left half are not read", self.folder, self.num_torn)

    def open(self) -> AppendLog:
        """Reads the keys on disk."""
        for _ in self.read():
            pass
        return self

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, key: str) -> Entry:
        """The value recorded under a key."""
        path, start, size = self._locations[key]
        with path.open("rb") as file:
            file.seek(start)
            entry = _parsed(file.read(size))
        assert entry is not None, "it was read before"
        return entry

    def append(self, key: str | None, values: Entry) -> None:
        """Records values under a key, or without one, from any thread; they are on disk when it returns."""
        entry = {"key": key, "time": round(time.time(), 3), **values}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            file = self._file or self._start()
            start = file.tell()
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._remember(entry, Path(file.name), start, len(line))

    def close(self) -> None:
        """Closes this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}{SUFFIX}"
        self._file = (self.folder / name).open("xb")
        return self._file

    def _remember(self, entry: Entry, path: Path, start: int, size: int) -> None:
        if entry["key"] is not None:
            self._locations.setdefault(entry["key"], (path, start, size))


def _parsed(line: bytes) -> Entry | None:
    """The entry of a whole line; None for a half one."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    return entry if isinstance(entry.get("key", 0), str | None) else None
