"""Files and folders that readers see whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".tmp"
"""Of files that are being written; one that is old was left by a process that was killed."""


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a new file beside `path`, which takes its place when the block ends; after an error nothing has changed.

    The folder is made if missing. Several processes may write the same path: the last one to finish wins.

    Example:
        ```python
        with atomic_file(run / "last.ckpt") as file:
            torch.save(checkpoint, file)
        ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic on one file system only; a name of its own for every writer.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the rename and lose the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Writes a file by `atomic_file`, text as UTF-8, and returns its path."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Makes an empty folder beside `path`, which takes its place when the block ends; after an error it is removed.

    Example:
        ```python
        with atomic_folder("out/dataset") as work:
            (work / "README.md").write_text(text)
        ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        work, before = Path(scratch, "new"), Path(scratch, "old")
        work.mkdir()
        yield work
        if path.exists():
            path.rename(before)  # no system renames onto a folder that has something in it
        work.rename(path)
