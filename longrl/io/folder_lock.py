"""A folder that one process at a time writes to."""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import socket
import weakref
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other processes out of a folder until it is released, or its process has ended in whatever way.

    The file stays behind, for deleting one that another process waits for would give both the lock.

    Args:
        folder: is made if missing.
        option: how the user named it, for errors.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, folder: str | Path, option: str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] | None = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._file)
            self.close()
            raise ValueError(
                f"{option}={folder} is in use by {holder}: two runs would overwrite each other's files. Wait for its "
                f"end or stop it, or name another {option}"
            ) from None
        except OSError as error:  # a file system without locks, as NFS may be
            logger.warning("%s=%s cannot be locked (%s): see that no other run writes to it", option, folder, error)
            self.close()
            return
        _HELD.add(self)
        self._file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Lets others in; a second call does nothing."""
        if self._file is not None:
            self._file.truncate(0)
            self.close()

    def close(self) -> None:
        """Gives the file up, and the lock with it if no other process has it from this one."""
        if self._file is not None:
            self._file.close()
            self._file = None


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _holder(file: IO[str]) -> str:
    """Who holds a lock, in words."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun to write
        return "another process"


def _leave_to_parent() -> None:
    for lock in list(_HELD):
        lock.close()


# A forked worker has the file open too, and would keep the lock of a run that was killed until it has noticed.
os.register_at_fork(after_in_child=_leave_to_parent)
