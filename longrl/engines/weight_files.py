"""Where weights on their way to a server lie: one folder per version, gone once the server has them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

NAME = "longrl-weights"


def default_folder() -> Path:
    """Shared memory where the system has it."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def new_folder(parent: Path) -> Path:
    """A folder for the weights of this process, readable by its user alone; what dead runs of this machine left goes.

    Args:
        parent: seen by the server too.
    """
    parent.mkdir(parents=True, exist_ok=True)
    machine = socket.gethostname()
    for left in parent.glob(f"{NAME}-{machine}-*"):
        owner, process, _ = left.name.rsplit("-", 2)
        if owner == f"{NAME}-{machine}" and not _is_alive(int(process)):  # not of a machine whose name begins like ours
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{NAME}-{machine}-{os.getpid()}-", dir=parent))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it lives, as another user's
    return True
