"""Where the frames of a video come from when they are asked for: memory, a video file, or a list of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX, FrameListReader
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, MediaLimits
from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.video import VideoReader
from longrl.types import FULL_SHARD, Frames, FrameShard, TemporalPatchSize

MAX_CHUNK_BYTES = 256 << 20
"""Pixels of a video that are in memory in the file's own size at once: 43 frames of 1920 x 1080, 5 of 4096 x 4096."""


@dataclass(frozen=True)
class DecodeLimits:
    """How much of a video is in memory."""

    chunk_frames: int = 32
    """Frames that are there in the file's own size at once, at most; fewer of large ones."""
    max_held_mib: int = 2048
    """Frames at the encoder's size that a loader hands over in memory. A larger shard of a video is decoded twice: by
    the loader, to see that it can be, and again, chunk by chunk, while the encoder encodes it."""
    media: MediaLimits = DEFAULT_MEDIA_LIMITS
    """What one file may cost."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("decode_chunk_frames", self.chunk_frames, 1),
            ("max_held_mib", self.max_held_mib, 0),
        ):
            if value < least:
                raise ValueError(f"data.{option} must be at least {least}, got {value}")

    def frames_at_once(self, outline: Frames) -> int:
        """How many frames of a video are read at once."""
        frame_bytes = max(math.prod(outline.pixels.shape[1:]), 1)
        return max(min(self.chunk_frames, MAX_CHUNK_BYTES // frame_bytes), 1)


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
    limits: DecodeLimits
    remote: RemoteMedia = NO_REMOTE

    def __call__(self) -> Iterator[Frames]:
        """The shard's frames in chunks, on the CPU."""
        reader = self._reader()
        return reader.chunks(self.limits.frames_at_once(reader.outline))

    def decoded_on(self, device: torch.device) -> Iterator[Frames]:
        """The same on the encoder's device, if the video is to be decoded there.

        Raises:
            ValueError: it is to be, and the device is no GPU.
        """
        reader = self._reader()
        num_frames = self.limits.frames_at_once(reader.outline)
        if self.sampling.decode_on == "cpu" or not isinstance(reader, VideoReader):
            return reader.chunks(num_frames)
        if device.type != "cuda":
            raise ValueError(
                f"data.video.decode_on=encoder needs the encoder on a CUDA device, but it is on {device}; set it to cpu"
            )
        return reader.chunks(num_frames, device)

    def _reader(self) -> VideoReader | FrameListReader:
        return open_video(
            self.path, self.sampling, self.shard, self.temporal_patch_size, self.remote, self.limits.media
        )


def open_video(
    path: str | Path,
    sampling: VideoSampling,
    shard: FrameShard = FULL_SHARD,
    temporal_patch_size: int | TemporalPatchSize = 1,
    remote: RemoteMedia = NO_REMOTE,
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
) -> VideoReader | FrameListReader:
    """The reader of a video file or of a list of frames; see `VideoReader` for arguments and errors."""
    if str(path).endswith(FRAME_LIST_SUFFIX):
        return FrameListReader(path, sampling, shard, temporal_patch_size, remote.local_path, limits)
    return VideoReader(path, sampling, shard, temporal_patch_size, limits)


def read_video(
    path: str | Path,
    sampling: VideoSampling,
    shard: FrameShard = FULL_SHARD,
    temporal_patch_size: int | TemporalPatchSize = 1,
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
) -> Frames:
    """The sampled frames of a video, all of them in memory; see `VideoReader` for arguments and errors.

    Returns:
        Frames with pixels [F, 3, H, W] of the shard in the file's own size, and times of all frames from the container,
        0 at its first one.
    """
    reader = open_video(path, sampling, shard, temporal_patch_size, limits=limits)
    return next(reader.chunks(max(len(reader.indices), 1)), reader.outline)
