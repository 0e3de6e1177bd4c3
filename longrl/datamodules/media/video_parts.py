"""Parts of a video as tools show them: which frames, which part of the picture, and how large.

A part is known by its key, size and times before a frame of it is decoded, so that one whose features are there already
costs no decoding. It can be decoded again later, by the rank and process that needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from longrl.datamodules.media.frame_lists import FrameListReader
from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, open_video
from longrl.datamodules.media.video import VideoReader
from longrl.types import Frames

MAX_ENLARGED = 4.0
"""A small part of a picture is enlarged by so much at most along each side."""
DEFAULT_LIMITS = DecodeLimits()
ONE_FRAME = VideoSampling(fps=None, num_frames=1, min_frames=1, max_frames=1, torn="keep")
"""The frame in the middle."""


def frame_at(time_s: float) -> VideoSampling:
    """The frame on show at a time."""
    return replace(ONE_FRAME, span_s=(time_s, time_s + 1e-4))


@dataclass(frozen=True)
class VideoPart:
    """A `Frames.source`: some frames of a video, or one of them as an image, all of the picture or a part of it."""

    path: str
    sampling: VideoSampling
    is_image: bool = False
    """The frame is an image; then there is one."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the part of the picture, between 0 and 1; None is all of it."""
    max_pixels: int | None = None
    """A larger picture is made smaller, and a part of one that is smaller is enlarged; None leaves them as they are."""
    limits: DecodeLimits = DEFAULT_LIMITS
    remote: RemoteMedia = NO_REMOTE

    def outline(self) -> Frames:
        """The frames without their pixels, [0, 3, H, W].

        Raises:
            UnusableSample: the file cannot be read, or has no such part.
        """
        return self._outline(self._reader().outline)

    def __call__(self) -> Iterator[Frames]:
        """The frames in chunks."""
        reader = self._reader()
        outline = self._outline(reader.outline)
        for chunk in reader.chunks(self.limits.frames_at_once(reader.outline)):
            pixels = chunk.pixels
            if pixels.shape[1:] != outline.pixels.shape[1:]:
                pixels = self._fitted(pixels, outline)
            yield replace(outline, pixels=pixels)

    def _reader(self) -> VideoReader | FrameListReader:
        path = self.remote.local_path(self.path)
        return open_video(path, self.sampling, remote=self.remote, limits=self.limits.media)

    def _outline(self, whole: Frames) -> Frames:
        """What is shown, from the outline of whole frames."""
        height, width = whole.pixels.shape[-2:]
        size = self._size(height, width)
        key = whole.key
        if self.is_image or size != (height, width):
            said = f"{key} image {self.is_image} box {self.box} size {size} bicubic"
            key = hashlib.sha256(said.encode()).hexdigest()
        pixels = torch.empty(0, 3, *size, dtype=torch.uint8)
        if self.is_image:
            return replace(whole, kind="image", timestamps=(0.0,), pixels=pixels, key=key, source=self)
        return replace(whole, pixels=pixels, key=key, source=self)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that are shown."""
        left, top, right, bottom = self._edges(height, width)
        height, width = bottom - top, right - left
        if self.max_pixels is None:
            return height, width
        scale = (self.max_pixels / (height * width)) ** 0.5
        scale = min(scale, 1.0 if self.box is None else MAX_ENLARGED)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def _edges(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The box in pixels, at least one along each side."""
        if self.box is None:
            return 0, 0, width, height
        left, right = _pixels_between(self.box[0], self.box[2], width)
        top, bottom = _pixels_between(self.box[1], self.box[3], height)
        return left, top, right, bottom

    def _fitted(self, pixels: Tensor, outline: Frames) -> Tensor:
        """[F, 3, h, w] uint8 of whole frames [F, 3, H, W]."""
        left, top, right, bottom = self._edges(*pixels.shape[-2:])
        size = tuple(outline.pixels.shape[-2:])
        pixels = pixels[..., top:bottom, left:right]
        if pixels.shape[-2:] == size:
            return pixels.contiguous()
        fitted = torch.empty(len(pixels), 3, *size, dtype=torch.uint8)
        for frame, out in zip(pixels, fitted, strict=True):  # one by one: floats of all would take four times as much
            scaled = interpolate(frame[None].float(), size=size, mode="bicubic", antialias=True)[0]
            out.copy_(scaled.round_().clamp_(0, 255))
        return fitted


def _pixels_between(first: float, last: float, length: int) -> tuple[int, int]:
    """The pixels of a side that lie between two shares of it, at least one."""
    start = min(int(first * length), length - 1)
    return start, max(min(-int(-last * length // 1), length), start + 1)


def video_length_s(path: str, remote: RemoteMedia, limits: DecodeLimits) -> float:
    """Seconds of a video.

    Raises:
        UnusableSample: it cannot be read.
    """
    return VideoPart(path, ONE_FRAME, limits=limits, remote=remote).outline().duration_s
