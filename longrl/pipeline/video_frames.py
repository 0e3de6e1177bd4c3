"""Times and pixels of single frames, by the container's own time stamps: no index is ever turned into a time.

PyAV reads the packets of a whole file without decoding it, so that times are exact and a header without duration
(webm) does no harm. Frames are found by their stamp, from the key frame before them.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longrl.chat.frames import MessagePart, data_url, frame_name, frame_parts

if TYPE_CHECKING:
    from PIL.Image import Image

REMUX = "copy it into another container with `ffmpeg -i IN -c copy OUT.mp4`"


class BrokenVideo(ValueError):
    """A file without frames that can be found or decoded."""

    kind = "broken video"
    """Name that it is counted under."""


@dataclass(frozen=True)
class Times:
    """Times at which the frames of a video are on show."""

    pts: tuple[int, ...]
    """[N] increasing stamps."""
    starts: NDArray[np.float64]
    """[N] seconds at which each appears, 0 for the first."""
    end_s: float
    """Second at which the last one disappears."""
    key_pts: tuple[int, ...]
    """Stamps of the key frames."""

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
    with _video_stream(path) as (container, stream):
        # Discarded packets are decoded for the sake of others, but never shown (edit lists).
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        stamped = [(packet.pts, packet.duration, packet.is_keyframe) for packet in packets]
        time_base = stream.time_base
    if not stamped or time_base is None or any(stamp is None for stamp, *_ in stamped):
        raise BrokenVideo(f"{path} has no frames with times, so none can be found by time; {REMUX}")
    shown = {stamp: (duration, is_key) for stamp, duration, is_key in stamped}
    pts = tuple(sorted(shown))
    starts = np.array([float((stamp - pts[0]) * time_base) for stamp in pts])
    steps = np.diff(starts)
    last = shown[pts[-1]][0]
    last_s = float(last * time_base) if last else float(np.median(steps)) if len(steps) else 0.0
    keys = tuple(stamp for stamp in pts if shown[stamp][1])
    return Times(pts, starts.round(6), round(float(starts[-1]) + last_s, 6), keys)


@contextlib.contextmanager
def _video_stream(path: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and first video stream of a file; errors inside the block become `BrokenVideo`."""
    import av

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise BrokenVideo(f"{path} has no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise BrokenVideo(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def middle_frames(times: Times, first: int, stop: int, count: int) -> list[int]:
    """Indices of the frames on show at the middles of `count` equal spans of [first, stop); each once."""
    start_s, end_s = times.start(first), times.start(stop)
    moments = start_s + (np.arange(count) + 0.501) * (end_s - start_s) / count
    indices = np.searchsorted(times.starts, moments, side="right") - 1
    return sorted({int(index) for index in indices.clip(first, stop - 1)})


# ---------------------------------------------------------------------------------------------------------- decoding


def decode_frames(path: str, indices: Iterable[int], times: Times) -> Iterator[tuple[int, Any]]:
    """(index, PyAV frame) of those of the requested frames that decode, in order.

    The decoder goes on from frame to frame, and jumps where a key frame lies between the last one and the next.
    """
    key_frames = {index: bisect.bisect_right(times.key_pts, times.pts[index]) for index in sorted(set(indices))}
    with _video_stream(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}  # else what is broken is painted over
        # Frames behind the same key frame are one decoding.
        for num_keys, run in itertools.groupby(key_frames, key_frames.__getitem__):
            start = times.key_pts[max(num_keys - 1, 0)] if times.key_pts else times.pts[0]
            container.seek(start, stream=stream)
            yield from _decode_run(container, stream, list(run), times)


def _decode_run(container: Any, stream: Any, run: Sequence[int], times: Times) -> Iterator[tuple[int, Any]]:
    import av

    rest = {times.pts[index]: index for index in run}
    span = times.pts[-1] - times.pts[0]
    latest = 64 * max(1, span // max(1, len(times.pts) - 1))  # stamps after which a frame does not come any more
    broken = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:  # frames behind it rest on it, up to the next key frame
            broken = True
            continue
        for frame in frames:
            broken = broken and not frame.key_frame
            index = rest.pop(frame.pts, None)
            if index is not None and not (broken or frame.is_corrupt):
                yield index, frame
        # B frames come up to 16 frames late
        if not rest or (packet.dts is not None and packet.dts > max(rest) + latest):
            return


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

    def url(self, index: int) -> str:
        """Name of one frame in a request."""
        return frame_name(self.digest, index, self.max_side)

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
