"""Files to `Frames`: which frames of a video are read, and the reading itself (decord, Pillow).

Runs in loader workers. What cannot be read as it is raises `BrokenMedia`; nothing is ever put in its place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.strategies.frames import WHOLE, Share
from longrl.types import Frames

UNRELIABLE_CONTAINERS = {b"\x47": "MPEG transport stream", b"\x00\x00\x01\xba": "MPEG program stream", b"FLV": "FLV"}
"""First bytes -> container in which decord 0.6 seeks to wrong frames without saying so when there are B-frames."""
REMUX = "copy it into another container with `ffmpeg -i IN -c copy OUT.mp4`"


class BrokenMedia(ValueError):
    """A file that is missing or cannot be decoded.

    Example:
        `BrokenMedia("clips/7.mp4", "the file does not exist")`
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are read: so many per second, or so many in all.

    Example:
        `VideoSampling(fps=2.0, max_frames=256)` or `VideoSampling(fps=None, num_frames=64)`
    """

    fps: float | None = 2.0
    """Frames per second of video; None when `num_frames` says how many."""
    num_frames: int | None = None
    """The same number for every video."""
    min_frames: int = 4
    """Fewer only if the video has fewer."""
    max_frames: int = 768
    """Longer videos are sampled more thinly."""

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.num_frames is None):
            raise ValueError(
                f"set either fps or num_frames, got fps={self.fps} and num_frames={self.num_frames}; "
                "for a fixed number of frames set fps to null"
            )
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"frames must satisfy 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}"
            )
        if self.num_frames is not None and not self.min_frames <= self.num_frames <= self.max_frames:
            raise ValueError(
                f"num_frames={self.num_frames} must lie between min_frames={self.min_frames} and "
                f"max_frames={self.max_frames}; change one of the three"
            )

    def count(self, duration_s: float) -> int:
        """Frames wanted of a video of this length, whether or not it has as many."""
        if self.fps is None:
            assert self.num_frames is not None
            return self.num_frames
        return min(max(round(duration_s * self.fps), self.min_frames), self.max_frames)


# --------------------------------------------------------------------------------------------------------- sampling


def sample_indices(starts: Sequence[float] | NDArray[np.float64], end_s: float, sampling: VideoSampling) -> list[int]:
    """Indices of the frames on show at the middles of equal spans of time.

    Time decides, not the index: where the frame rate varies, a stretch with many frames gets no more than its share. A
    frame on show at several of those moments is taken once, so a video that stands still may give fewer frames than
    `sampling.count`, yet never fewer than `num_frames` or `min_frames` while it has them.

    Args:
        starts: [N] increasing times in seconds at which the frames appear; N >= 1.
        end_s: when the last frame disappears.
        sampling: how many.

    Returns:
        Increasing indices without repeats.
    """
    times = np.asarray(starts, dtype=np.float64)
    duration_s = end_s - times[0]
    count = sampling.count(duration_s)
    if count >= len(times):
        return list(range(len(times)))
    # The thousandth keeps a moment that falls on a frame's start on one side of it: decord's times are float32.
    moments = times[0] + (np.arange(count) + 0.501) * duration_s / count
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    return _fill_gaps(times, chosen.tolist(), sampling.num_frames or sampling.min_frames)


def _fill_gaps(times: NDArray[np.float64], chosen: list[int], at_least: int) -> list[int]:
    """Adds the frame farthest in time from all chosen ones until there are `at_least`."""
    if len(chosen) >= at_least:
        return chosen
    distance = np.abs(times[:, None] - times[chosen]).min(axis=1)  # [N]
    chosen = list(chosen)
    while len(chosen) < at_least:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(times - times[chosen[-1]]))
    return sorted(chosen)


# ---------------------------------------------------------------------------------------------------------- reading


def read_video(
    path: str | Path, sampling: VideoSampling, share: Share = WHOLE, frames_per_cell: int = 1
) -> Frames:
    """The sampled frames of a video file.

    Args:
        path: a file of any format that decord reads (mp4, mov, mkv, webm, avi); sound is not looked at.
        sampling: which frames.
        share: whose of them to decode; the others only count.
        frames_per_cell: frames that stay together when a video is shared.

    Returns:
        Frames with pixels [F, 3, H, W] of the share in the file's own size, and times of all frames from the container,
        0 at its first one.

    Raises:
        BrokenMedia: no such file, or a frame that was asked for cannot be decoded exactly.
    """
    import decord

    digest = _digest(path)
    _refuse_unreliable(path)
    decord.logging.set_level(decord.logging.QUIET)  # what goes wrong is in the exception
    with _as_broken(path):
        # fault_tol: any frame that decord would fill in with a neighbour is an error.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        starts, end_s = _frame_times(reader, path)
        indices = sample_indices(starts, end_s, sampling)
        held = share.frames(len(indices), frames_per_cell)
        wanted = indices[held.start : held.stop]
        # Without a frame of its own a rank decodes the first, for the size.
        pixels = torch.from_numpy(reader.get_batch(wanted or indices[:1]).asnumpy()).permute(0, 3, 1, 2)
        del reader  # frees the decoder and its frame queue now, not at the next garbage collection
    return Frames(
        kind="video",
        pixels=pixels[: len(wanted)],
        timestamps=tuple(starts[indices].tolist()),
        key=hashlib.sha256(f"video {digest} decord {decord.__version__} {indices}".encode()).hexdigest(),
        duration_s=end_s - float(starts[0]),
    )


def read_image(path: str | Path, share: Share = WHOLE) -> Frames:
    """An image file as one RGB frame [1, 3, H, W], turned upright as its EXIF orientation says.

    A rank whose share it is not gets [0, 3, H, W].

    Raises:
        BrokenMedia: no such file, or it cannot be decoded.
    """
    from PIL import Image, ImageOps, __version__

    digest = _digest(path)
    with _as_broken(path), Image.open(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    key = hashlib.sha256(f"image {digest} Pillow {__version__}".encode()).hexdigest()
    held = len(share.cells(1))
    return Frames("image", torch.from_numpy(pixels).permute(2, 0, 1)[None][:held], timestamps=(0.0,), key=key)


def _frame_times(reader: Any, path: str | Path) -> tuple[NDArray[np.float64], float]:
    """When each frame appears [N], and when the last one disappears, in seconds."""
    times = reader.get_frame_timestamp(list(range(len(reader)))).astype(np.float64).round(6)  # [N, 2]
    starts, steps = times[:, 0], np.diff(times[:, 0])
    if not np.isfinite(times).all() or starts[0] < 0 or (steps <= 0).any():
        raise BrokenMedia(path, f"its frames have no increasing times, so none can be found by time; {REMUX}")
    if times[-1, 1] > starts[-1]:
        return starts, float(times[-1, 1])
    return starts, float(starts[-1] + (np.median(steps) if len(steps) else 0.0))


def _refuse_unreliable(path: str | Path) -> None:
    with open(path, "rb") as file:
        head = file.read(189)
    for magic, name in UNRELIABLE_CONTAINERS.items():
        # a transport stream repeats its mark every 188 bytes; a lone 0x47 is only the letter G
        if head.startswith(magic) and (magic != b"\x47" or head[188:189] == magic):
            raise BrokenMedia(path, f"decord does not find the right frames in an {name}; {REMUX}")


@contextmanager
def _as_broken(path: str | Path) -> Iterator[None]:
    """Turns whatever a decoder raises into `BrokenMedia`; decord alone raises five unrelated types."""
    try:
        yield
    except (BrokenMedia, MemoryError):
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "no message")
        raise BrokenMedia(path, f"it cannot be decoded ({type(error).__name__}: {first_line[:200]})") from error


def _digest(path: str | Path) -> str:
    """Sha256 of a file's content."""
    try:
        state = os.stat(path)
        if state.st_size == 0:
            raise BrokenMedia(path, "the file is empty")
        return _digest_of_version(os.path.abspath(path), state.st_size, state.st_mtime_ns)
    except FileNotFoundError as error:
        raise BrokenMedia(path, f"the file does not exist (working folder: {os.getcwd()})") from error
    except OSError as error:
        raise BrokenMedia(path, f"the file cannot be opened ({error.strerror})") from error


@lru_cache(maxsize=65536)
def _digest_of_version(path: str, size: int, mtime_ns: int) -> str:
    """Read once per worker and version of the file: an hour of video may be gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
