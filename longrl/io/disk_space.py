"""Does what a run will write fit on its disk, and may it be written there at all?"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

GIB = 2**30


def free_bytes(folder: Path) -> int:
    """Bytes free for whoever is no administrator, on the disk where a folder is or will be."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


def tell_missing_space(folder: Path, needed: int, reason: str, remedy: str) -> bool:
    """Warns, and returns True, if a folder's disk has less room than is needed.

    Args:
        folder: where it will be written.
        needed: bytes.
        reason: what needs them.
        remedy: options that need less.
    """
    free = free_bytes(folder)
    if free >= needed:
        return False
    logger.warning(
        "%s needs %.1f GiB for %s, but %.1f GiB are free; free some space, name a --run_dir on another disk, or %s",
        folder,
        needed / GIB,
        reason,
        free / GIB,
        remedy,
    )
    return True


def check_writable(folder: str, option: str = "--run_dir") -> None:
    """Raises ValueError, before anything is loaded, if a run could not write into a folder; makes the folder.

    Args:
        folder: that the option names.
        option: of the command line.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{option}={folder} cannot be written ({error.strerror or error}); name another one, free some space, or "
            "change its permissions"
        ) from error
