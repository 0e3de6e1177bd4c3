"""Files to `Frames`: reading the sampled frames of a video (PyAV), and images (Pillow).

Runs in loader workers. What cannot be read as it is raises `UnusableSample`; nothing is ever put in its place. A video
is decoded frame by frame, so what is in memory is what the caller asks for at once (bench/decode.py). Until the encoder
reads them, frames of a large video stay in memory at its size (`HeldFrames`), or in their file (`FileFrames`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import FULL_SHARD, Frames, FrameShard, TemporalPatchSize, UnusableSample

UNRELIABLE_CONTAINERS = {b"\x47": "MPEG transport stream", b"\x00\x00\x01\xba": "MPEG program stream", b"FLV": "FLV"}
"""First bytes -> container without an index, in which a seek may end elsewhere than at the key frame asked for."""
SEEK_FRAMES = 8
"""A key frame so many frames ahead is reached faster by a seek than by decoding what lies between."""
MIB = 1 << 20
_DIGESTS: dict[tuple[str, int, int], str] = {}
"""Path, size and time of change of a file -> sha256 of its content."""
REMUX = "copy it into another container with `ffmpeg -i IN -c copy OUT.mp4`"


@dataclass(frozen=True)
class DecodeLimits:
    """How much of a video is in memory."""

    chunk_frames: int = 32
    """Frames that are there in the file's own size at once."""
    max_held_mib: int = 2048
    """Frames at the encoder's size that a loader hands over in memory. A larger shard of a video is decoded twice: by
    the loader, to see that it can be, and again, chunk by chunk, while the encoder encodes it."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("decode_chunk_frames", self.chunk_frames, 1),
            ("max_held_mib", self.max_held_mib, 0),
        ):
            if value < least:
                raise ValueError(f"data.{option} must be at least {least}, got {value}")


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
    """The sampled frames of a video file, of a rank's shard.

    Args:
        path: a file of any format that FFmpeg reads and finds frames in (mp4, mov, mkv, webm, avi); sound is not
            looked at.
        sampling: which frames.
        shard: which of them to decode; the others only count.
        temporal_patch_size: frames that stay together when a video is split over ranks.

    Raises:
        UnusableSample: no such file, or one in which frames cannot be found by time.

    Example:
        `for frames in VideoReader("clip.mp4", VideoSampling(fps=1.0)).chunks(32): ...`
    """

    def __init__(
        self,
        path: str | Path,
        sampling: VideoSampling,
        shard: FrameShard = FULL_SHARD,
        temporal_patch_size: int | TemporalPatchSize = 1,
    ) -> None:
        import av

        # 1. What the file is, and when its frames appear.
        digest = content_digest(path)
        index = _frame_index(path)
        duration_s = index.end_s - float(index.starts[0])
        if sampling.span_s is not None and sampling.span_s[0] >= duration_s:
            start_s = sampling.span_s[0]
            raise UnusableSample(path, f"it ends after {duration_s:.1f} s, before the part from {start_s:g} s on")
        # 2. Which frames are sampled, and which of them are this rank's.
        indices = sample_indices(index.starts, index.end_s, sampling)
        held = shard.frames(len(indices), temporal_patch_size)
        self.path = path
        self._index = index
        self.indices = indices[held.start : held.stop]
        """Those of the shard's frames in the file."""
        self.outline = Frames(
            kind="video",
            pixels=torch.empty(0, 3, *index.size, dtype=torch.uint8),
            timestamps=tuple((index.starts[indices] - index.starts[0]).tolist()),
            key=hashlib.sha256(f"video {digest} PyAV {av.__version__} {indices}".encode()).hexdigest(),
            duration_s=duration_s,
            indices=tuple(indices),
        )
        """Times, key and size, without a frame."""

    def chunks(self, num_frames: int) -> Iterator[Frames]:
        """The shard's frames, so many at a time, the last time fewer. Each call decodes anew.

        Raises:
            UnusableSample: a frame of the chunk cannot be decoded exactly.
        """
        height, width = self._index.size
        with _opened(self.path) as (container, stream):
            position = FramePosition(container, stream, self._index)
            for start in range(0, len(self.indices), num_frames):
                chunk = self.indices[start : start + num_frames]
                pixels = np.empty((len(chunk), height, width, 3), np.uint8)  # [F, H, W, 3]
                for i, index in enumerate(chunk):
                    frame = position.advance_to(index)
                    if frame is None or frame.is_corrupt:
                        raise UnusableSample(self.path, f"it cannot be decoded (frame {index} is damaged or missing)")
                    pixels[i] = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                yield replace(self.outline, pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2))


class FramePosition:
    """Where decoding stands in a file: it goes on from frame to frame, or from a key frame if that is nearer.

    Args:
        container: of PyAV, just opened.
        stream: of PyAV.
        index: of the file.
    """

    def __init__(self, container: Any, stream: Any, index: FrameIndex) -> None:
        self._container = container
        self._stream = stream
        self._index = index
        self._frames = container.decode(stream)
        self._next = 0

    def advance_to(self, index: int) -> Any | None:
        """The frame of that index, later than the last one; None if the file does not give it."""
        # The key frame before the frame: a seek to it pays where it lies far ahead.
        pts = int(self._index.pts[index])
        key = int(self._index.keys[np.searchsorted(self._index.keys, index, side="right") - 1])
        seeks = [key, 0] if key - self._next > SEEK_FRAMES else [None]  # a seek may end behind the key frame
        self._next = index + 1
        for start in seeks:
            if start is not None:
                self._container.seek(int(self._index.pts[start]), stream=self._stream)
                self._frames = self._container.decode(self._stream)
            for frame in self._frames:
                if frame.pts is not None and frame.pts >= pts:
                    if frame.pts == pts:
                        return frame
                    break
        return None


@dataclass(frozen=True)
class HeldFrames:
    """A `Frames.source` in memory."""

    frames: Frames

    def __call__(self) -> Iterator[Frames]:
        """All frames at once."""
        yield self.frames


@dataclass(frozen=True)
class FileFrames:
    """A `Frames.source` that decodes a rank's shard of a file, a chunk of full-size frames at a time."""

    path: str
    sampling: VideoSampling
    shard: FrameShard
    temporal_patch_size: int | TemporalPatchSize
    chunk_frames: int

    def __call__(self) -> Iterator[Frames]:
        """The shard's frames in chunks."""
        reader = VideoReader(self.path, self.sampling, self.shard, self.temporal_patch_size)
        return reader.chunks(self.chunk_frames)


def hold_frames(parts: Iterator[Frames], num_frames: int, max_mib: int) -> Frames | None:
    """Joins the parts of a video, or gives None if they are larger than allowed. All are drawn in either case.

    Args:
        parts: of one video, at least one; each is copied and let go.
        num_frames: of all parts.
        max_mib: what they may take.
    """
    first = next(parts)
    if num_frames * first.pixels[0].nbytes > max_mib * MIB:
        for _ in parts:  # a frame that breaks shows now
            pass
        return None
    pixels = torch.empty(num_frames, *first.pixels.shape[1:], dtype=first.pixels.dtype)  # [F, 3, H, W]
    pixels[: len(first.pixels)] = first.pixels
    done = len(first.pixels)
    for part in parts:
        pixels[done : done + len(part.pixels)] = part.pixels
        done += len(part.pixels)
    return replace(first, pixels=pixels)


def read_video(
    path: str | Path,
    sampling: VideoSampling,
    shard: FrameShard = FULL_SHARD,
    temporal_patch_size: int | TemporalPatchSize = 1,
) -> Frames:
    """The sampled frames of a video file, all of them in memory; see `VideoReader` for arguments and errors.

    Returns:
        Frames with pixels [F, 3, H, W] of the shard in the file's own size, and times of all frames from the container,
        0 at its first one.
    """
    reader = VideoReader(path, sampling, shard, temporal_patch_size)
    return next(reader.chunks(max(len(reader.indices), 1)), reader.outline)


def read_image(path: str | Path, shard: FrameShard = FULL_SHARD) -> Frames:
    """An image file as one RGB frame [1, 3, H, W], turned upright as its EXIF orientation says.

    A rank whose shard it is not gets [0, 3, H, W].

    Raises:
        UnusableSample: no such file, or it cannot be decoded.
    """
    from PIL import Image, ImageOps, __version__

    digest = content_digest(path)
    with decoder_errors(path), Image.open(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    key = hashlib.sha256(f"image {digest} Pillow {__version__}".encode()).hexdigest()
    held = len(shard.temporal_patches(1))
    frame = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return Frames("image", frame[:held], timestamps=(0.0,), key=key, indices=(0,))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A file's container and its video stream. One thread: loader workers are many."""
    import av

    with decoder_errors(path), av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise UnusableSample(path, "it cannot be decoded (there is no video in it)")
        stream.codec_context.thread_count = 1
        yield container, stream


def _frame_index(path: str | Path) -> FrameIndex:
    # 1. Containers without an index are refused before FFmpeg guesses.
    with open(path, "rb") as file:
        head = file.read(189)
    for magic, name in UNRELIABLE_CONTAINERS.items():
        # a transport stream repeats its mark every 188 bytes; a lone 0x47 is only the letter G
        if head.startswith(magic) and (magic != b"\x47" or head[188:189] == magic):
            raise UnusableSample(path, f"frames cannot be found reliably in an {name}; {REMUX}")
    # 2. Times and key frames from the packets alone.
    with _opened(path) as (container, stream):
        packets = [
            (packet.pts, packet.duration or 0, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        if not packets:
            raise UnusableSample(path, "it cannot be decoded (there are no frames in it)")
        # An AVI stores frames in decoding order and no times at all.
        timeless = container.format.name == "avi" and stream.codec_context.has_b_frames
        size, unit = (stream.height, stream.width), float(stream.time_base or 0)
    if timeless or any(pts is None for pts, _, _ in packets):
        raise _timeless(path)
    # 3. Frames in the order shown, [N] each.
    pts, durations, is_key = (np.array(column) for column in zip(*sorted(packets), strict=True))
    starts = pts.astype(np.float64) * unit
    if unit <= 0 or starts[0] < 0 or (np.diff(pts) <= 0).any():
        raise _timeless(path)
    is_key[0] = True  # there is nothing before it
    last_s = durations[-1] * unit or (float(np.median(np.diff(starts))) if len(pts) > 1 else 0.0)
    return FrameIndex(pts, starts, float(starts[-1] + last_s), np.flatnonzero(is_key), size)


def sample_indices(starts: Sequence[float] | NDArray[np.float64], end_s: float, sampling: VideoSampling) -> list[int]:
    """Indices of the frames on show at the middles of equal spans of time.

    Time decides, not the index: where the frame rate varies, a stretch with many frames gets no more than its share. A
    frame on show at several of those moments is taken once, so a video that stands still may give fewer frames than
    `fps` asks for, yet never fewer than `num_frames` or `min_frames` while it has them.

    Args:
        starts: [N] increasing times in seconds at which the frames appear; N >= 1.
        end_s: when the last frame disappears.
        sampling: how many.

    Returns:
        Increasing indices without repeats.
    """
    times = np.asarray(starts, dtype=np.float64)
    # A span is sampled as a video of its own.
    if sampling.span_s is not None:
        first, last_s = sampling.span_s
        held = slice(max(_shown_at(times, times[0] + first), 0), _shown_at(times, times[0] + last_s, "left") + 1)
        inside = sample_indices(times[held], min(end_s, times[0] + last_s), replace(sampling, span_s=None))
        return [held.start + index for index in inside]
    # As many frames as the rate asks for, within the limits; all of them where the video has no more.
    duration_s = end_s - times[0]
    count = sampling.num_frames or round(duration_s * (sampling.fps or 0.0))
    count = min(max(count, sampling.min_frames), sampling.max_frames)
    if count >= len(times):
        return list(range(len(times)))
    # The thousandth keeps a moment that falls on a frame's start on one side of it, however times are rounded.
    moments = times[0] + (np.arange(count) + 0.501) * duration_s / count
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    at_least = sampling.num_frames or sampling.min_frames
    return chosen.tolist() if len(chosen) >= at_least else _fill_gaps(times, chosen.tolist(), at_least)


def _shown_at(times: NDArray[np.float64], moment: float, side: Literal["left", "right"] = "right") -> int:
    """Index of the frame on show at a moment, and with "left" right before it."""
    return int(np.searchsorted(times, moment, side=side)) - 1


def _fill_gaps(times: NDArray[np.float64], chosen: list[int], at_least: int) -> list[int]:
    """Adds the frame farthest in time from all chosen ones until there are `at_least`."""
    distance = np.abs(times[:, None] - times[chosen]).min(axis=1)  # [N]
    chosen = list(chosen)
    while len(chosen) < at_least:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(times - times[chosen[-1]]))
    return sorted(chosen)


def _timeless(path: str | Path) -> UnusableSample:
    return UnusableSample(path, f"its frames have no increasing times, so none can be found by time; {REMUX}")


@contextmanager
def decoder_errors(path: str | Path) -> Iterator[None]:
    """Turns whatever a decoder raises into `UnusableSample`."""
    try:
        yield
    except (UnusableSample, MemoryError):
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "no message")
        raise UnusableSample(path, f"it cannot be decoded ({type(error).__name__}: {first_line[:200]})") from error


def content_digest(path: str | Path) -> str:
    """Sha256 of a file's content, read once per worker and version of the file: an hour of video may be gigabytes."""
    try:
        state = os.stat(path)
        if state.st_size == 0:
            raise UnusableSample(path, "the file is empty")
        version = (os.path.abspath(path), state.st_size, state.st_mtime_ns)
        if version not in _DIGESTS:
            with open(path, "rb") as file:
                _DIGESTS[version] = hashlib.file_digest(file, "sha256").hexdigest()
        return _DIGESTS[version]
    except FileNotFoundError as error:
        raise UnusableSample(path, f"the file does not exist (working folder: {os.getcwd()})") from error
    except OSError as error:
        raise UnusableSample(path, f"the file cannot be opened ({error.strerror})") from error
