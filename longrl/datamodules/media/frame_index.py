"""What a container says of its frames before any is decoded, and where it may be wrong: broadcasts and torn files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, DecodeClock, MediaLimits, open_container
from longrl.datamodules.media.orientation import UPRIGHT, Orientation

BROADCASTS = ("mpegts", "mpeg")
"""FFmpeg's names of containers without an index: recordings of broadcasts, which begin and end anywhere."""
MAX_MISSING_S = 1.0
"""A video or sound that ends so much earlier than its container says is torn; less is rounding."""
TIMELESS = "its frames have no increasing times, so none can be found by time"
ENCODE_ANEW = "make a readable file of it with `ffmpeg -i IN -c:v libx264 -crf 18 -pix_fmt yuv420p OUT.mp4`"
CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class FrameIndex:
    """When the frames of a file appear, and how they stand. N frames in the order shown."""

    pts: NDArray[np.int64]
    """[N] increasing times in the file's own unit; they name a frame."""
    starts: NDArray[np.float64]
    """[N] the same in seconds."""
    end_s: float
    """When the last frame disappears."""
    keys: NDArray[np.int64]
    """Numbers of the frames at which decoding can begin."""
    size: tuple[int, int]
    """Height and width as the frames are stored."""
    orientation: Orientation = UPRIGHT
    """What makes them upright."""
    has_alpha: bool = False
    """True if pixels may be transparent: they lie on white then."""
    key_bytes: NDArray[np.int64] | None = None
    """Where in the file each key frame begins, for containers in which a seek by time ends anywhere."""
    in_order: bool = False
    """Frames have no times of their own: the n-th that the decoder gives is the n-th shown."""
    missing_s: float = 0.0
    """Seconds behind `end_s` that the file should have: it was cut off."""
    is_exactly_turned: bool = True
    """The display matrix has right angles to the last digit; False where it is only taken for such a one."""
    pixel_format: str = ""
    """FFmpeg's name of how pixels are stored."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width as the frames are to be seen."""
        return self.orientation.size(*self.size)

    @property
    def pixel_rule(self) -> str:
        """The rule by which stored pixels are not shown as they are; "" for most files."""
        turned = "" if self.orientation == UPRIGHT else f" {self.orientation}"
        return turned + (" on white" if self.has_alpha else "")

    def rgb_pixels(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """[H, W, 3] pixels of a frame as they are to be seen."""
        height, width = self.size
        form = "rgba" if self.has_alpha else "rgb24"
        pixels: NDArray[Any] = frame.reformat(width=width, height=height, format=form).to_ndarray()
        if self.has_alpha:
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return self.orientation.turn(pixels)

    def first_frames(self, count: int) -> FrameIndex:
        """The index of a file that ends behind so many frames, at least one."""
        if count == len(self.pts):
            return self
        count = max(count, 1)
        num_keys = int(np.searchsorted(self.keys, count))
        return replace(
            self,
            pts=self.pts[:count],
            starts=self.starts[:count],
            end_s=float(self.starts[count]),
            keys=self.keys[:num_keys],
            key_bytes=None if self.key_bytes is None else self.key_bytes[:num_keys],
        )


class PacketTimes(NamedTuple):
    """What a packet of a video says of its frame, without being decoded."""

    pts: int | None
    """When the frame appears, in the stream's unit."""
    duration: int
    is_key: bool
    is_corrupt: bool
    """Only a part of it is there."""
    dts: int | None
    """When it is decoded."""
    position: int
    """Byte of the file at which it begins; 0 where FFmpeg cannot say."""


@dataclass(frozen=True)
class PacketScan:
    """The result of one pass over the packets of a video file."""

    packets: list[PacketTimes]
    """Those of frames that are shown, in the order of the file."""
    num_packets: int
    """All of them."""
    num_declared: int
    """Frames that the header promises; 0 where it does not say."""
    declared_s: float
    """Length in seconds that it promises; 0.0 where it does not say."""
    unit_s: float
    """Seconds that times are multiples of."""
    size: tuple[int, int]
    """Height and width as the frames are stored."""
    display_matrix: bytes | None
    """How the first frame is to be shown."""
    has_alpha: bool
    """True if its pixels may be transparent."""
    pixel_format: str
    """FFmpeg's name of how they are stored; "" where it does not decode."""
    is_broadcast: bool
    """True for a recording that may begin and end anywhere."""
    in_order: bool
    """True for frames without times of their own; see `FrameIndex`."""


def trim_broadcast(packets: Sequence[PacketTimes]) -> list[PacketTimes]:
    """The packets of a recording from its first key frame on; frames before it rest on what was not recorded.

    Args:
        packets: in the order of the file.

    Raises:
        ValueError: times jump back, as where recordings were joined.
    """
    first = next((index for index, packet in enumerate(packets) if packet.is_key), len(packets))
    decoded = [packet.dts for packet in packets[first:] if packet.dts is not None]
    if any(later < earlier for earlier, later in itertools.pairwise(decoded)):
        raise ValueError("its times jump back, as where recordings were joined")
    start = packets[first].pts if first < len(packets) else None
    return [packet for packet in packets[first:] if packet.pts is None or start is None or packet.pts >= start]


def missing_tail_s(path: str | Path, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> float:
    """Seconds of video that a file says it has and lacks at its end; 0.0 where it is whole.

    An index that names every frame decides (mp4, mov); else the number of frames (avi), the stream's own duration
    (Matroska), or the container's, which is that of its longest stream. Containers that say nothing count as whole.
    """
    clock = DecodeClock(path, limits)
    with open_container(path, limits) as container:
        # 1. How far the video goes, and how far anything does.
        video = container.streams.best("video")
        assert video is not None, "its frames are known"
        num_whole, ends_torn = 0, False
        ends = {stream.index: Fraction(0) for stream in container.streams}
        for packet in container.demux():
            clock.check()
            if not packet.size or packet.pts is None:
                continue
            if packet.stream_index == video.index:
                ends_torn = packet.is_corrupt
                num_whole += not packet.is_corrupt
            if not packet.is_corrupt:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                ends[packet.stream_index] = max(ends[packet.stream_index], end)

        # 2. How far it should go.
        rate = video.average_rate or video.guessed_rate or Fraction(1)
        if video.frames:
            missing_s = float((video.frames - num_whole) / rate)
            names_every_frame = container.format.name != "avi"
        else:
            declared_s, reached_s = _declared_end_s(video.metadata.get("DURATION", "")), float(ends[video.index])
            if not declared_s:
                start_s = max(container.start_time or 0, 0) / av.time_base
                declared_s = start_s + (container.duration or 0) / av.time_base
                reached_s = float(max(ends.values()))
            missing_s = declared_s - reached_s
            names_every_frame = False
    if missing_s > MAX_MISSING_S or (names_every_frame and missing_s > 0):
        return missing_s
    return max(missing_s, float(1 / rate)) if ends_torn else 0.0


def _declared_end_s(clock: str) -> float:
    """Seconds of "00:01:05.200000000"; 0.0 of anything else."""
    match = CLOCK.fullmatch(clock)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0
