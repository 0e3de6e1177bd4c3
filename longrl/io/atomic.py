"""Files and folders that readers see whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".tmp"
"""End of the names of files and folders being written; one that is old was left by a process that was killed."""
STALE_AFTER_S = 86_400.0
"""A partial that nobody has written to for a day is such a one: no live writer pauses for so long."""
OLD = "old"
"""Folder within the partial of a folder, for what stood there before."""


@contextlib.contextmanager
def atomic_file(path: str | Path, *, clean: bool = True) -> Iterator[BinaryIO]:
    """Opens a new file beside `path`, which takes its place when the block ends; after an error nothing has changed.

    The folder is made if missing. Several processes may write the same path: the last one to finish wins. `clean`
    looks through the folder for what killed writers of the path left, and removes it.

    Example:
        ```python
        with atomic_file(run / "last.ckpt") as file:
            torch.save(checkpoint, file)
        ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if clean:
        _remove_stale(path)
    # Beside the target, since a rename is atomic on one file system only; a name of its own for every writer.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the rename and lose the content
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Writes a file by `atomic_file` and returns its path. Text is UTF-8, lone surrogates are written as escapes."""
    with atomic_file(path, clean=False) as file:  # over in no time, and there are folders with many files
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Makes an empty folder beside `path`, which takes its place when the block ends; after an error it is removed.

    Args:
        path: of the folder; what stands there stays as it is until then, also if the new one cannot take its place.
        replace: False refuses to put it in the place of another, also of one that appears meanwhile.

    Raises:
        FileExistsError: there is something at `path`, which is not to be replaced.

    Example:
        ```python
        with atomic_folder("out/dataset") as work:
            (work / "README.md").write_text(text)
        ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent) as scratch:
        work, before = Path(scratch, "new"), Path(scratch, OLD)
        work.mkdir()
        yield work
        sync_files(work)
        try:
            if path.exists():
                if not replace:
                    raise FileExistsError(f"{path} has appeared while it was being written; name a new folder")
                path.rename(before)  # no system renames onto a folder that has something in it
            work.rename(path)
            sync_folder(path.parent)
        except BaseException:  # an interrupt too: the scratch folder is deleted, and what stood there with it
            if before.exists() and not path.exists():
                before.rename(path)
            raise


def sync_folder(folder: str | Path) -> None:
    """Has the system put a folder's own entries on the disk: a rename that is not there is lost by a power cut."""
    with contextlib.suppress(OSError):  # some network file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(folder: Path) -> None:
    """Has the system put on the disk what other libraries wrote into a folder and below it."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def set_aside(path: Path) -> Path:
    """Gives a file or folder another name in its folder, `NAME.old1` and so on, so that another takes its place."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return path.rename(aside)


def _remove_stale(path: Path) -> None:
    """Removes what killed writers of `path` left: partials that nobody has written to for long."""
    partials = list(path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"))
    now = _file_time(path.parent) if partials else 0.0
    for left in partials:
        is_anothers = left.name.count(".") > path.name.count(".") + 3  # of a name that begins like this one
        with contextlib.suppress(OSError):  # its writer, or another process that cleans up, was faster
            newest = max(entry.stat().st_mtime for entry in (left, *left.rglob("*")))
            if is_anothers or now - newest < STALE_AFTER_S:
                continue
            if not path.exists() and (left / OLD).exists():  # killed between the two renames
                (left / OLD).rename(path)
            shutil.rmtree(left, ignore_errors=True)  # a folder
            left.unlink(missing_ok=True)  # a file


def _file_time(folder: Path) -> float:
    """Now, by the clock that dates files there: this machine's own may have been set, or be another than a server's."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0
