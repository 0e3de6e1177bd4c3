"""Where the media of a row may lie: records come from strangers, and name whatever file they like."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from longrl.types import UnusableSample

LOCAL_PROTOCOLS = (
    "file", "local", "dir", "asynclocal", "async_wrapper", "asyncwrapper", "reference", "generic", "git", "dvc", "dask",
)  # fmt: skip
"""Protocols of fsspec that read files of this machine, or hand a path on to one that does."""


@dataclass(frozen=True)
class MediaRoots:
    """Folders that local media of rows must lie in, links followed.

    Example:
        `MediaRoots.below(["data/videos"]).check("data/videos/../secret.mp4")` raises.
    """

    folders: tuple[str, ...] | None = None
    """Without links in them; None for anywhere."""

    @classmethod
    def below(cls, roots: Iterable[str | None]) -> MediaRoots:
        """Folders where relative paths start; None is the working folder."""
        folders = [os.path.realpath(os.path.expanduser(root or ".")) for root in roots]
        return cls(tuple(dict.fromkeys(folders + [blobs for folder in folders for blobs in _blobs(folder)])))

    def check(self, path: str, follow: bool = True) -> None:
        """Raises UnusableSample for a path or URL that leads elsewhere on this machine.

        Args:
            path: as a row has it, from the working folder on.
            follow: look where links lead, which asks the disk.
        """
        if self.folders is None:
            return
        if "://" in path:
            if any(link.partition("://")[0].lower() in LOCAL_PROTOCOLS for link in _links(path)):
                raise UnusableSample(path, f"its protocol reads files of this machine; {self._remedy()}")
            return
        try:
            real = _real(os.path.expanduser(path)) if follow else os.path.abspath(os.path.expanduser(path))
        except (ValueError, OSError) as error:  # a NUL, half a character
            raise UnusableSample.because(error, "it is no path", path) from error
        if not any(_is_in(real, folder) for folder in self.folders):
            by_link = f", as {real}" if real != os.path.abspath(os.path.expanduser(path)) else ""
            raise UnusableSample(path, f"it lies outside data.media_root{by_link}; {self._remedy()}")

    def _remedy(self) -> str:
        assert self.folders is not None, "the caller has looked"
        return (
            f"set data.media_root (now {self.folders[0]}) to the folder of the media, or "
            "data.allow_outside_paths=true if you trust the rows"
        )


ANYWHERE = MediaRoots()


def _links(url: str) -> list[str]:
    """The parts of a chained URL; one without a protocol is a local file."""
    return [link if "://" in link or link.isidentifier() else f"file://{link}" for link in url.split("::")]


def _real(path: str) -> str:
    """The path without links. Many files are in one folder, which is looked at once."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(folder), name)


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder or ".")


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _blobs(folder: str) -> list[str]:
    """What the files of a snapshot of the hub's cache link to."""
    for inner in (Path(folder), *Path(folder).parents):
        blobs = inner.parent.parent / "blobs"
        if inner.parent.name == "snapshots" and blobs.is_dir():
            return [str(blobs)]
    return []
