"""Frames of a video file by PyAV: exact whatever the container makes of a seek, and none that met an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.opening import (
    DEFAULT_MEDIA_LIMITS,
    DecodeClock,
    MediaLimits,
    decoder_errors,
    open_container,
    open_decoder,
)
from longrl.types import UnusableSample

SEEK_FRAMES = 8
"""A key frame so many frames ahead is reached faster by a seek than by decoding what lies between."""


class PyAVFrames:
    """Pixels of an opened file's frames, one after the other; see `DecodesFrames`."""

    def __init__(self, path: str | Path, container: Any, stream: Any, index: FrameIndex, limits: MediaLimits) -> None:
        self._path = path
        self._index = index
        self._position = FramePosition(container, stream, index, DecodeClock(path, limits))

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[F, 3, H, W] uint8."""
        height, width = self._index.size
        is_plain = not self._index.pixel_rule
        pixels = np.empty((len(indices), *self._index.shown_size, 3), np.uint8)  # [F, H, W, 3]
        for i, index in enumerate(indices):
            frame = self._position.advance_to(index)
            if frame is None:
                raise UnusableSample(self._path, f"it cannot be decoded (frame {index} is damaged or missing)")
            if is_plain:
                pixels[i] = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
            else:
                pixels[i] = self._index.rgb_pixels(frame)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class FramePosition:
    """Where decoding stands in a file: it goes on from frame to frame, or from a key frame if that is nearer.

    Whatever the container makes of a seek, a frame is given only if decoding began at a key frame of the index at or
    before it, or at the file's beginning, and met no error since.
    """

    def __init__(self, container: Any, stream: Any, index: FrameIndex, clock: DecodeClock) -> None:
        self._container = container
        self._stream = stream
        self._index = index
        self._clock = clock
        self._frames = _decoded(container, stream, index, clock, None if index.key_bytes is None else len(index.pts))
        self._next = 0
        self._can_jump = not index.in_order
        self._can_restart = not index.in_order
        self._lost_key = -1
        """Number of a key frame behind which something is damaged; frames that rest on it are not tried again."""

    def advance_to(self, index: int) -> Any | None:
        """The frame of that index, later than the last one; None if it is damaged or missing.

        Raises:
            UnusableSample: decoding takes longer than the limits allow.
        """
        self._clock.start()
        pts = int(self._index.pts[index])
        nth = int(np.searchsorted(self._index.keys, index, side="right")) - 1
        if nth == self._lost_key:
            return None
        # 1. Going on, or a jump to a key frame far ahead. A seek may fail, and an open GOP may need what is before it.
        is_far = self._can_jump and int(self._index.keys[nth]) - self._next > SEEK_FRAMES
        starts: list[int | None] = [] if is_far else [None]
        if self._can_jump:
            starts += [nth, nth - 1] if self._index.key_bytes is not None and nth > 1 else [nth]
        starts.append(0)
        self._next = index + 1
        # 2. The frame of that time, from the first start that leads to it.
        for start in starts:
            if start == 0 and not self._can_restart:
                continue
            try:
                if start is not None:
                    self._jump(start, index)
                for frame in self._frames:
                    if frame.pts is not None and frame.pts >= pts:
                        if frame.pts > pts or frame.is_corrupt:
                            break
                        # From here on in turn, if only the beginning leads to a frame.
                        self._can_jump = self._can_jump and (start != 0 or nth == 0)
                        return frame
            except av.FFmpegError:  # damaged, or begun too late
                pass
            self._can_restart = self._can_restart and start != 0
        self._lost_key = nth
        return None

    def _jump(self, nth: int, index: int) -> None:
        """Has decoding begin at the nth key frame, or at one between that and a frame."""
        if self._index.key_bytes is not None:
            position = int(self._index.key_bytes[nth]) if nth else 0
            self._container.seek(position, stream=self._stream, unsupported_byte_offset=True)
            last: int | None = index
        else:
            self._container.seek(int(self._index.pts[self._index.keys[nth]]), stream=self._stream)
            last = index if nth else None  # nothing is before the first one
        self._frames = _decoded(self._container, self._stream, self._index, self._clock, last)


def _decoded(container: Any, stream: Any, index: FrameIndex, clock: DecodeClock, last: int | None) -> Iterator[Any]:
    """Frames from where a container stands to a damaged packet.

    Decoding begins at the first key frame of the index, which must not be later than frame `last`; at once if that is
    None.
    """
    shown = index.pts
    limit, is_waiting = len(shown) if last is None else last, last is not None
    num_frames = 0
    for packet in container.demux(stream):
        clock.check()
        if is_waiting:
            if packet.pts is None or not packet.is_keyframe:
                continue
            number = int(np.searchsorted(shown, packet.pts))
            if number > limit:
                return
            if number == len(shown) or shown[number] != packet.pts:
                continue
            is_waiting = False
        if packet.is_corrupt:
            yield from stream.decode(None)  # what the decoder holds is whole
            return
        for frame in packet.decode():
            if index.in_order and num_frames < len(shown):
                frame.pts = int(shown[num_frames])
            num_frames += 1
            yield frame


@contextmanager
def opened_video(path: str | Path, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> Iterator[tuple[Any, Any]]:
    """A file's container and its video stream; what goes wrong inside is `UnusableSample`."""
    with decoder_errors(path), open_container(path, limits) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise UnusableSample(path, "it cannot be decoded (there is no video in it)")
        open_decoder(path, stream, limits)
        yield container, stream
