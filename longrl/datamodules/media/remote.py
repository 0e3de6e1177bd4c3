"""Media that lie elsewhere (https, s3, gs, hf): copied into a local folder once, and read there."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from longrl.datamodules.media.media_roots import ANYWHERE, MediaRoots
from longrl.io.atomic import atomic_file
from longrl.types import UnusableSample

NOT_ALLOWED = "it lies elsewhere, and nothing is fetched unless data.allow_remote_media is true"
CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
GONE = (404, 410)
FETCH_S = 1200.0
"""Limit of fetching one file, with all attempts: other ranks wait meanwhile."""
NUM_PROBES = 3
"""Files of a protocol that are asked for before a run begins; one that answers is enough."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL of fsspec: anything with `://`."""
    return "://" in path


def default_folder() -> str:
    """Where remote media are kept unless `data.media_cache_dir` says so."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "longrl", "media")


@dataclass(frozen=True)
class RemoteMedia:
    """Local copies of remote media.

    A copy is named by its URL and is not looked for again: what changes under one URL is read anew once its copy is
    deleted. Nothing deletes copies by itself.
    """

    folder: str | None = None
    """Where copies are kept; None where nothing may be fetched."""
    roots: MediaRoots = ANYWHERE
    """Where local media may lie."""

    def local_path(self, path: str) -> str:
        """The path of a local file: the same, or a copy, made now if there is none yet.

        Raises:
            UnusableSample: remote media are not allowed, or this one cannot be read; a local one is outside the roots.
            OSError: the folder cannot be written.
        """
        self.roots.check(path)
        if not is_remote(path):
            return path
        if self.folder is None:
            raise UnusableSample(path, NOT_ALLOWED)
        # The suffix stays, for it says that a file is a list of frames, and helps FFmpeg.
        name = os.path.basename(urlsplit(path).path).partition(".")
        copy = Path(self.folder, hashlib.sha256(path.encode()).hexdigest()[:32] + name[1] + name[2][-16:])
        deadline = time.monotonic() + FETCH_S
        for attempt in range(1, ATTEMPTS + 1):
            if copy.is_file():
                break
            try:
                with atomic_file(copy) as file:  # readers see all of it or nothing
                    for chunk in _remote_bytes(path):
                        file.write(chunk)
                        if time.monotonic() > deadline:
                            raise UnusableSample(path, f"it cannot be fetched within {FETCH_S:g} s")
            except UnusableSample as error:
                if attempt == ATTEMPTS or time.monotonic() > deadline or error.reason == "the file does not exist":
                    raise
                time.sleep(2.0 ** (attempt - 1))
        return str(copy)


NO_REMOTE = RemoteMedia()


def check_access(paths: Iterable[str]) -> None:
    """Asks for a few files of every protocol among the paths, before a run begins.

    Raises:
        ValueError: a package that fsspec needs is missing, or none of the files that were tried answers.
    """
    import fsspec

    by_protocol: dict[str, dict[str, None]] = defaultdict(dict)
    for path in paths:
        if is_remote(path):
            by_protocol[path.partition("://")[0].rpartition("::")[2]][path] = None
    for protocol, urls in by_protocol.items():
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{len(urls)} media lie at {protocol}://, which cannot be read here: {error}; install that, or "
                "download the files"
            ) from error
        problems = [problem for url in list(urls)[:NUM_PROBES] if (problem := _probe(url)) is not None]
        if len(problems) == min(len(urls), NUM_PROBES):
            raise ValueError(
                f"none of {len(problems)} media that were tried at {protocol}:// can be read, the last: "
                f"{problems[-1]}; check network, credentials and the urls"
            )


def _probe(url: str) -> str | None:
    """Why nothing can be read at a url; None if its first bytes, or the news that there is no such file, came back."""
    try:
        next(_remote_bytes(url, 1), b"")
    except UnusableSample as error:
        return None if error.reason == "the file does not exist" else str(error)
    return None


def _remote_bytes(url: str, num_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A remote file, chunk by chunk."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(num_bytes):
                yield chunk
    except FileNotFoundError as error:
        # Of the web fsspec says so too where nobody answers; then what happened is its cause, without a status of 404.
        cause = error.__cause__
        if isinstance(cause, Exception) and url.startswith("http") and getattr(cause, "status", 0) not in GONE:
            raise UnusableSample.because(cause, "it cannot be fetched", url) from error
        raise UnusableSample(url, "the file does not exist") from error
    except Exception as error:  # every protocol has errors of its own
        raise UnusableSample.because(error, "it cannot be fetched", url) from error
