"""Times and pixels of single frames, by the container's own time stamps: no index is ever turned into a time.

Files are read as in training (`longrl.datamodules.media.video`): times from the packets alone, frames upright. What
does not decode is left out here, and the rest used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray

from longrl.chat.frames import MessagePart, data_url, frame_name, frame_parts
from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, DecodeClock
from longrl.datamodules.media.pyav_frames import FramePosition, opened_video
from longrl.datamodules.media.video import read_frame_index
from longrl.types import UnusableSample

if TYPE_CHECKING:
    from PIL.Image import Image


class BrokenVideo(ValueError):
    """A file without frames that can be found or decoded."""

    kind = "broken video"
    """Name that it is counted under."""


@dataclass(frozen=True)
class Times:
    """Times at which the frames of a video are on show."""

    starts: NDArray[np.float64]
    """[N] seconds at which each appears, 0 for the first."""
    end_s: float
    """Second at which the last one disappears."""
    index: FrameIndex
    """Where they are found."""

    def at(self, second: float) -> int:
        """Index of the first frame that appears at a time or later (to the microsecond); N if none does."""
        return int(np.searchsorted(self.starts, second - 1e-6, side="left"))

    def start(self, index: int) -> float:
        """Second at which frame `index` appears; for N, the end."""
        return float(self.starts[index]) if index < len(self.starts) else self.end_s


@lru_cache(maxsize=256)
def frame_times(path: str) -> Times:
    """Times of all frames of a file, from its packets.

    Raises:
        BrokenVideo: no such file, no video in it, or packets without times.
    """
    with _broken_videos():
        index = read_frame_index(path)
    starts = index.starts - index.starts[0]
    return Times(starts.round(6), round(index.end_s - float(index.starts[0]), 6), index)


@contextlib.contextmanager
def _broken_videos() -> Iterator[None]:
    """Turns `UnusableSample` into `BrokenVideo`."""
    try:
        yield
    except UnusableSample as error:
        raise BrokenVideo(f"{error.path} cannot be read: {error.reason}") from error


def middle_frames(times: Times, first: int, stop: int, count: int) -> list[int]:
    """Indices of the frames on show at the middles of `count` equal spans of [first, stop); each once."""
    start_s, end_s = times.start(first), times.start(stop)
    moments = start_s + (np.arange(count) + 0.501) * (end_s - start_s) / count
    indices = np.searchsorted(times.starts, moments, side="right") - 1
    return sorted({int(index) for index in indices.clip(first, stop - 1)})


# ---------------------------------------------------------------------------------------------------------- decoding


def decode_frames(path: str, indices: Iterable[int], times: Times) -> Iterator[tuple[int, Any]]:
    """(index, PyAV frame) of those of the requested frames that decode, in order and upright.

    The decoder goes on from frame to frame, and jumps where a key frame lies between the last one and the next.
    """
    with _broken_videos(), opened_video(path) as (container, stream):
        position = FramePosition(container, stream, times.index, DecodeClock(path, DEFAULT_MEDIA_LIMITS))
        for index in sorted(set(indices)):
            frame = position.advance_to(index)
            if frame is not None:
                yield index, _as_seen(frame, times.index) if times.index.pixel_rule else frame


def _as_seen(frame: Any, index: FrameIndex) -> Any:
    seen = av.VideoFrame.from_ndarray(np.ascontiguousarray(index.rgb_pixels(frame)), "rgb24")
    seen.time_base = frame.time_base
    return seen


def read_images(path: str, indices: Iterable[int], times: Times, max_side: int) -> dict[int, Image]:
    """Index -> RGB picture, at most `max_side` pixels on its longer side; frames that do not decode are left out."""
    images = {}
    for index, frame in decode_frames(path, indices, times):
        image = frame.to_image()
        image.thumbnail((max_side, max_side))
        images[index] = image
    return images


# -------------------------------------------------------------------------------------------------- in a message


@dataclass(frozen=True)
class FrameSet:
    """Some frames of a video for a request: named by what decides their pixels, decoded when a call is made."""

    path: str
    digest: str
    """Sha256 of the file."""
    indices: tuple[int, ...]
    max_side: int
    pixel_rule: str = ""
    """Of the file's `FrameIndex`."""

    def url(self, index: int) -> str:
        """Name of one frame in a request; another one than before there was a rule for its pixels."""
        digest = self.digest
        if self.pixel_rule:
            digest = hashlib.sha256(f"{digest}{self.pixel_rule}".encode()).hexdigest()
        return frame_name(digest, index, self.max_side)

    def parts(self) -> list[MessagePart]:
        """Message parts: each frame behind its time."""
        times = frame_times(self.path)
        return frame_parts([self.url(index) for index in self.indices], [times.start(index) for index in self.indices])

    def load(self) -> Mapping[str, str]:
        """Name -> `data:` url of the frames that decode; the model reads that the others are broken.

        Raises:
            BrokenVideo: none decodes.
        """
        images = read_images(self.path, self.indices, frame_times(self.path), self.max_side)
        if not images:
            raise BrokenVideo(f"{self.path}: none of the frames {list(self.indices)} can be decoded")
        return {self.url(index): data_url(image) for index, image in images.items()}


def file_digest(path: str | Path) -> str:
    """Sha256 of a file's content.

    Raises:
        BrokenVideo: it cannot be read.
    """
    try:
        state = os.stat(path)
        return _digest_of_version(str(path), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise BrokenVideo(f"{path} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=65536)
def _digest_of_version(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
