"""Where the frames of a large video are until the encoder reads them: in memory at the encoder's size, or in their file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from longrl.datamodules.media.video import VideoReader, VideoSampling
from longrl.types import Frames, FrameShard, TemporalPatchSize

MIB = 1 << 20


@dataclass(frozen=True)
class Decoding:
    """How much of a video is in memory."""

    chunk_frames: int = 32
    """Frames that are there in the file's own size at once."""
    max_held_mib: int = 2048
    """Frames at the encoder's size that a loader hands over in memory. A larger share of a video is decoded twice: by the
    loader, to see that it can be, and again, chunk by chunk, while the encoder encodes it."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("decode_chunk_frames", self.chunk_frames, 1),
            ("max_held_mib", self.max_held_mib, 0),
        ):
            if value < least:
                raise ValueError(f"data.{option} must be at least {least}, got {value}")


@dataclass(frozen=True)
class HeldFrames:
    """A `Frames.source` in memory."""

    frames: Frames

    def __call__(self) -> Iterator[Frames]:
        """All frames at once."""
        yield self.frames


@dataclass(frozen=True)
class FileFrames:
    """A `Frames.source` that decodes a rank's share of a file, a chunk of full-size frames at a time."""

    path: str
    sampling: VideoSampling
    share: FrameShard
    temporal_patch_size: int | TemporalPatchSize
    chunk_frames: int

    def reader(self) -> VideoReader:
        """The file, opened; see `VideoReader` for errors."""
        return VideoReader(self.path, self.sampling, self.share, self.temporal_patch_size)

    def __call__(self) -> Iterator[Frames]:
        """The share's frames in chunks."""
        return self.reader().chunks(self.chunk_frames)


def joined(parts: Iterator[Frames], num_frames: int, max_mib: int) -> Frames | None:
    """The parts of a video as one, or None if that is larger than allowed. All parts are drawn in either case.

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
    pixels = torch.empty(num_frames, *first.pixels.shape[1:], dtype=first.pixels.dtype)
    pixels[: len(first.pixels)] = first.pixels
    done = len(first.pixels)
    for part in parts:
        pixels[done : done + len(part.pixels)] = part.pixels
        done += len(part.pixels)
    return replace(first, pixels=pixels)


def regrouped(parts: Iterator[Frames], num_frames: int) -> Iterator[Frames]:
    """The same frames in parts of `num_frames`, the last one perhaps smaller."""
    waiting: list[torch.Tensor] = []
    for part in parts:
        left = part.pixels
        while len(left):
            room = num_frames - sum(map(len, waiting))
            waiting.append(left[:room])
            left = left[room:]
            if room <= len(waiting[-1]):
                yield replace(part, pixels=torch.cat(waiting) if len(waiting) > 1 else waiting[0])
                waiting = []
    if waiting:
        yield replace(part, pixels=torch.cat(waiting))
