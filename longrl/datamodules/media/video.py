"""Files to `Frames`: which frames of a video are read, and the reading itself (PyAV, Pillow).

Runs in loader workers. What cannot be read as it is raises `BrokenMedia`; nothing is ever put in its place. A video is
decoded frame by frame, so what is in memory is what the caller asks for at once (bench/decode.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.types import FULL_SHARD, Frames, FrameShard, TemporalPatchSize

UNRELIABLE_CONTAINERS = {b"\x47": "MPEG transport stream", b"\x00\x00\x01\xba": "MPEG program stream", b"FLV": "FLV"}
"""First bytes -> container without an index, in which a seek may end elsewhere than at the key frame asked for."""
SEEK_FRAMES = 8
"""A key frame so many frames ahead is reached faster by a seek than by decoding what lies between."""
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
    span_s: tuple[float, float] | None = None
    """Only what is on show between these seconds of a video; a row's `metadata["span_s"]` takes its place."""

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
        if self.span_s is not None and not 0 <= self.span_s[0] < self.span_s[1]:
            raise ValueError(f"span_s must be two increasing seconds from 0 on, got {self.span_s}")

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
    if sampling.span_s is not None:
        first, last_s = sampling.span_s
        held = slice(max(_shown_at(times, times[0] + first), 0), _shown_at(times, times[0] + last_s, "left") + 1)
        inside = sample_indices(times[held], min(end_s, times[0] + last_s), replace(sampling, span_s=None))
        return [held.start + index for index in inside]
    duration_s = end_s - times[0]
    count = sampling.count(duration_s)
    if count >= len(times):
        return list(range(len(times)))
    # The thousandth keeps a moment that falls on a frame's start on one side of it, however times are rounded.
    moments = times[0] + (np.arange(count) + 0.501) * duration_s / count
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    return _fill_gaps(times, chosen.tolist(), sampling.num_frames or sampling.min_frames)


def _shown_at(times: NDArray[np.float64], moment: float, side: Literal["left", "right"] = "right") -> int:
    """Index of the frame on show at a moment, and with "left" right before it."""
    return int(np.searchsorted(times, moment, side=side)) - 1


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


@dataclass(frozen=True)
class FrameIndex:
    """When the frames of a file appear, from its packets alone: nothing is decoded. N frames in the order shown."""

    pts: NDArray[np.int64]
    """[N] increasing times in the file's own unit; they name a frame."""
    starts: NDArray[np.float64]
    """[N] the same in seconds."""
    end_s: float
    """When the last frame disappears."""
    keys: NDArray[np.int64]
    """Numbers of the frames at which decoding can begin."""
    size: tuple[int, int]
    """Height and width."""


class VideoReader:
    """The sampled frames of a video file, of a rank's share.

    Args:
        path: a file of any format that FFmpeg reads and finds frames in (mp4, mov, mkv, webm, avi); sound is not
            looked at.
        sampling: which frames.
        share: whose of them to decode; the others only count.
        temporal_patch_size: frames that stay together when a video is shared.

    Raises:
        BrokenMedia: no such file, or one in which frames cannot be found by time.

    Example:
        `for frames in VideoReader("clip.mp4", VideoSampling(fps=1.0)).chunks(32): ...`
    """

    def __init__(
        self,
        path: str | Path,
        sampling: VideoSampling,
        share: FrameShard = FULL_SHARD,
        temporal_patch_size: int | TemporalPatchSize = 1,
    ) -> None:
        import av

        digest = _digest(path)
        _refuse_unreliable(path)
        with _as_broken(path):
            index = _frame_index(path)
        _refuse_late_span(path, sampling, index.end_s - float(index.starts[0]))
        indices = sample_indices(index.starts, index.end_s, sampling)
        held = share.frames(len(indices), temporal_patch_size)
        self.path, self._index = path, index
        self.numbers = indices[held.start : held.stop]
        """Of the share's frames in the file."""
        self.outline = Frames(
            kind="video",
            pixels=torch.empty(0, 3, *index.size, dtype=torch.uint8),
            timestamps=tuple((index.starts[indices] - index.starts[0]).tolist()),
            key=hashlib.sha256(f"video {digest} PyAV {av.__version__} {indices}".encode()).hexdigest(),
            duration_s=index.end_s - float(index.starts[0]),
            indices=tuple(indices),
        )
        """Times, key and size, without a frame."""

    def chunks(self, num_frames: int) -> Iterator[Frames]:
        """The share's frames, so many at a time, the last time fewer. Each call decodes anew.

        Raises:
            BrokenMedia: a frame of the chunk cannot be decoded exactly.
        """
        frames = self._decoded()
        for start in range(0, len(self.numbers), num_frames):
            count = min(num_frames, len(self.numbers) - start)
            pixels = np.empty((count, *self._index.size, 3), np.uint8)
            with _as_broken(self.path):
                for place, frame in zip(range(count), frames, strict=False):
                    pixels[place] = frame
            yield replace(self.outline, pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def _decoded(self) -> Iterator[NDArray[np.uint8]]:
        """[H, W, 3] of each of the share's frames."""
        height, width = self._index.size
        with _opened(self.path) as (container, stream):
            position = FramePosition(container, stream, self._index)
            for number in self.numbers:
                frame = position.advance_to(number)
                if frame is None or frame.is_corrupt:
                    raise BrokenMedia(self.path, f"it cannot be decoded (frame {number} is damaged or missing)")
                yield frame.reformat(width=width, height=height, format="rgb24").to_ndarray()


class FramePosition:
    """Where decoding stands in a file: it goes on from frame to frame, or from a key frame if that is nearer.

    Args:
        container: of PyAV, just opened.
        stream: of PyAV.
        index: of the file.
    """

    def __init__(self, container: Any, stream: Any, index: FrameIndex) -> None:
        self._container, self._stream, self._index = container, stream, index
        self._frames = container.decode(stream)
        self._next = 0

    def advance_to(self, number: int) -> Any | None:
        """The frame of that number, later than the last one; None if the file does not give it."""
        pts = int(self._index.pts[number])
        key = int(self._index.keys[np.searchsorted(self._index.keys, number, side="right") - 1])
        frame = None
        if key - self._next > SEEK_FRAMES:
            frame = self._found(pts, key)
            if frame is None:  # the seek ended behind it
                self._seek(0)
        frame = frame or self._found(pts)
        self._next = number + 1
        return frame

    def _found(self, pts: int, key: int | None = None) -> Any | None:
        if key is not None:
            self._seek(key)
        frame = next((frame for frame in self._frames if frame.pts is not None and frame.pts >= pts), None)
        return frame if frame is not None and frame.pts == pts else None

    def _seek(self, key: int) -> None:
        self._container.seek(int(self._index.pts[key]), stream=self._stream)
        self._frames = self._container.decode(self._stream)


def read_video(
    path: str | Path,
    sampling: VideoSampling,
    share: FrameShard = FULL_SHARD,
    temporal_patch_size: int | TemporalPatchSize = 1,
) -> Frames:
    """The sampled frames of a video file, all of them in memory; see `VideoReader` for arguments and errors.

    Returns:
        Frames with pixels [F, 3, H, W] of the share in the file's own size, and times of all frames from the container,
        0 at its first one.
    """
    reader = VideoReader(path, sampling, share, temporal_patch_size)
    return next(reader.chunks(max(len(reader.numbers), 1)), reader.outline)


def read_image(path: str | Path, share: FrameShard = FULL_SHARD) -> Frames:
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
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None][:held]
    return Frames("image", pixels, timestamps=(0.0,), key=key, indices=(0,))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A file's container and its video stream. One thread: loader workers are many."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BrokenMedia(path, "it cannot be decoded (there is no video in it)")
        stream.codec_context.thread_count = 1
        yield container, stream


def _frame_index(path: str | Path) -> FrameIndex:
    with _opened(path) as (container, stream):
        packets = [
            (packet.pts, packet.duration or 0, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        if not packets:
            raise BrokenMedia(path, "it cannot be decoded (there are no frames in it)")
        # An AVI stores frames in decoding order and no times at all.
        timeless = container.format.name == "avi" and stream.codec_context.has_b_frames
        size, unit = (stream.height, stream.width), float(stream.time_base or 0)
    if timeless or any(pts is None for pts, _, _ in packets):
        raise _timeless(path)
    pts, durations, is_key = (np.array(column) for column in zip(*sorted(packets), strict=True))
    starts = pts.astype(np.float64) * unit
    if unit <= 0 or starts[0] < 0 or (np.diff(pts) <= 0).any():
        raise _timeless(path)
    is_key[0] = True  # there is nothing before it
    last_s = durations[-1] * unit or (float(np.median(np.diff(starts))) if len(pts) > 1 else 0.0)
    return FrameIndex(pts, starts, float(starts[-1] + last_s), np.flatnonzero(is_key), size)


def _refuse_late_span(path: str | Path, sampling: VideoSampling, length_s: float) -> None:
    if sampling.span_s is not None and sampling.span_s[0] >= length_s:
        raise BrokenMedia(path, f"it ends after {length_s:.1f} s, before the part from {sampling.span_s[0]:g} s on")


def _timeless(path: str | Path) -> BrokenMedia:
    return BrokenMedia(path, f"its frames have no increasing times, so none can be found by time; {REMUX}")


def _refuse_unreliable(path: str | Path) -> None:
    with open(path, "rb") as file:
        head = file.read(189)
    for magic, name in UNRELIABLE_CONTAINERS.items():
        # a transport stream repeats its mark every 188 bytes; a lone 0x47 is only the letter G
        if head.startswith(magic) and (magic != b"\x47" or head[188:189] == magic):
            raise BrokenMedia(path, f"frames cannot be found reliably in an {name}; {REMUX}")


@contextmanager
def _as_broken(path: str | Path) -> Iterator[None]:
    """Turns whatever a decoder raises into `BrokenMedia`."""
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
