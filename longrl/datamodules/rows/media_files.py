"""Where the video of a record lies: published records name files by an id, and archives unpack to other folders."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
"""Endings of files that an id without one may mean; capitals count alike."""
LAYOUTS = {"longvila_videos": "longvideo_eval_subset"}
"""Folder that a data set's records name -> first letters of those that its archives unpack to."""


def find_video(name: str, media_root: str | None) -> str:
    """The path of a record's video.

    A name with a folder is that path under `media_root`; if there is no such file and the folder's archives are known
    to unpack elsewhere (`LAYOUTS`), the file of this name there. A bare name, with or without suffix, is the one such
    file in `media_root` or in a folder of it. What is not found, or found several times (`copies_of`), stays as it is
    named: the data module lists it with the reason. Nothing ever stands for another video.

    Args:
        name: as the record has it, "longvila_videos/x.webm" or "fFjv93ACGo8".
        media_root: folder where relative names start; None for the working folder.
    """
    root = os.path.expanduser(media_root or "")
    path = os.path.join(root, os.path.expanduser(name))
    folder = os.path.dirname(name)
    if os.path.isabs(name) or os.path.isfile(path):
        return path
    if folder and folder not in LAYOUTS:
        return path
    matches = _matches(name, root)
    return matches[0] if len(matches) == 1 else path


def copies_of(path: str) -> list[str]:
    """The files that a path which does not exist may mean, as `find_video` left it because they are several."""
    root, file = os.path.split(path)
    above, folder = os.path.split(root)
    if folder in LAYOUTS:
        root, file = above, os.path.join(folder, file)
    matches = _matches(file, root)
    return matches if len(matches) > 1 else []


def _matches(name: str, root: str) -> list[str]:
    """All files in a folder, or in folders of it, that a bare name or one of `LAYOUTS` may mean."""
    folder, file = os.path.split(name)
    # `root` and the folders in it that begin with a prefix.
    folders: list[str] = []
    if os.path.isdir(root or "."):
        prefix = LAYOUTS.get(folder, "")
        inside = [name for name in _subfolders(root or ".", _version(root)) if name.startswith(prefix)]
        folders = [root, *(os.path.join(root, name) for name in inside)]
    return [os.path.join(one, match) for one in folders for match in _files(one, _version(one)).get(file, ())]


@lru_cache(maxsize=16)
def _subfolders(root: str, version: int) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))


@lru_cache(maxsize=256)
def _files(folder: str, version: int) -> dict[str, tuple[str, ...]]:
    """File name, and stem of a video's, -> the files that it may mean. Listed once per state of the folder."""
    files: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder or ".")):
        stem, suffix = os.path.splitext(name)
        for key in (name, stem) if suffix.lower() in VIDEO_SUFFIXES else (name,):
            files[key] = (*files.get(key, ()), name)
    return files


def _version(folder: str) -> int:
    return Path(folder or ".").stat().st_mtime_ns
