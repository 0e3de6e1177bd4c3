"""What tells the content of large files apart without reading all of it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

BLOCK_BYTES = 4096
NUM_BLOCKS = 1024
"""Of a file of 5 GB one every 5 MB: every matrix of a model of some billions of weights has one."""


def files_fingerprint(path: Path) -> str:
    """Sha256 that differs where a checkpoint, or a folder of weights, holds other values; of gigabytes, in moments.

    PyTorch's files are zips, whose directories have the checksum of every tensor. Of other files sizes count, and
    blocks at equal distances, small ones as a whole. Names of folders above `path` do not matter.

    Args:
        path: a file or a folder.
    """
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix()
        content = _zip_directory(file) if zipfile.is_zipfile(file) else _blocks(file)
        digest.update(f"\n{name} {file.stat().st_size} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _zip_directory(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        # PyTorch names the folder in the archive after the file.
        entries = [(item.filename.partition("/")[2], item.CRC, item.file_size) for item in archive.infolist()]
    return repr(entries).encode()


def _blocks(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            return content.read()
        digest = hashlib.sha256()
        for block in range(NUM_BLOCKS):
            content.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
            digest.update(content.read(BLOCK_BYTES))
        return digest.digest()
