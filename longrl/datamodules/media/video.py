"""Video files to `Frames`: which frames are sampled, by PyAV's scan of the packets, and their pixels, by a decoder.

Runs in loader workers. What cannot be read as it is raises `UnusableSample`; nothing is ever put in its place. A video
is decoded frame by frame, so what is in memory is what the caller asks for at once (bench/decode.py).
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData

from longrl.datamodules.media.decoders import (
    CPU,
    DecodesFrames,
    DecordFrames,
    TorchcodecFrames,
    check_readable,
    check_shown_size,
    decoder_version,
    refused,
)
from longrl.datamodules.media.device_frames import DeviceFrames
from longrl.datamodules.media.frame_index import (
    BROADCASTS,
    ENCODE_ANEW,
    MAX_MISSING_S,
    TIMELESS,
    FrameIndex,
    PacketScan,
    PacketTimes,
    missing_tail_s,
    trim_broadcast,
)
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, DecodeClock, MediaLimits, decoder_errors
from longrl.datamodules.media.orientation import UPRIGHT, is_exact, orientation_of
from longrl.datamodules.media.pyav_frames import FramePosition, PyAVFrames, opened_video
from longrl.datamodules.media.sampling import VideoSampling, sample_indices
from longrl.types import FULL_SHARD, Frames, FrameShard, TemporalPatchSize, UnusableSample

MIB = 1 << 20
_DIGESTS: dict[tuple[str, int, int], str] = {}
"""Path, size and time of change of a file -> sha256 of its content."""


class VideoReader:
    """The sampled frames of a video file, of a rank's shard.

    Args:
        path: a file of any format in which FFmpeg finds frames; sound is not looked at.
        sampling: which frames.
        shard: which of them to decode; the others only count.
        temporal_patch_size: frames that stay together when a video is split over ranks.
        limits: what the file may cost.

    Raises:
        UnusableSample: no such file, one in which frames cannot be found by time, or one above the limits.

    Example:
        `for frames in VideoReader("clip.mp4", VideoSampling(fps=1.0)).chunks(32): ...`
    """

    def __init__(
        self,
        path: str | Path,
        sampling: VideoSampling,
        shard: FrameShard = FULL_SHARD,
        temporal_patch_size: int | TemporalPatchSize = 1,
        limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
    ) -> None:
        # 1. What the file is, and when its frames appear.
        digest = content_digest(path)
        index = known_index(path, limits)
        duration_s = index.end_s - float(index.starts[0])
        if index.missing_s and sampling.torn == "skip":
            raise UnusableSample(
                path,
                f"it is torn: it ends after {duration_s:.1f} s, and the last {index.missing_s:.1f} s are missing; "
                "data.video.torn=keep uses what is there",
            )
        if index.missing_s or index.key_bytes is not None:  # cut off anywhere, also within a frame
            index = _without_damaged_end(path, index, limits)
            duration_s = index.end_s - float(index.starts[0])
        if sampling.span_s is not None and sampling.span_s[0] >= duration_s:
            start_s = sampling.span_s[0]
            raise UnusableSample(path, f"it ends after {duration_s:.1f} s, before the part from {start_s:g} s on")
        # 2. Which frames are sampled, and which of them are this rank's.
        indices = sample_indices(index.starts, index.end_s, sampling)
        held = shard.frames(len(indices), temporal_patch_size)
        self.path = path
        self._decoder = sampling.decoder
        self._limits = limits
        self._index = index
        self.indices = indices[held.start : held.stop]
        """Those of the shard's frames in the file."""
        decoder = decoder_version(sampling)
        # Keys of files that are shown as they are stored have no rule, as before there were any.
        said = f"video {digest} {decoder} {indices}{index.pixel_rule}"
        self.outline = Frames(
            kind="video",
            pixels=torch.empty(0, 3, *index.shown_size, dtype=torch.uint8),
            timestamps=tuple((index.starts[indices] - index.starts[0]).tolist()),
            key=hashlib.sha256(said.encode()).hexdigest(),
            duration_s=duration_s,
            indices=tuple(indices),
            missing_s=index.missing_s,
        )
        """Times, key and size, without a frame."""

    def chunks(self, num_frames: int, device: torch.device = CPU) -> Iterator[Frames]:
        """The shard's frames, so many at a time, the last time fewer. Each call decodes anew.

        Args:
            num_frames: of a chunk.
            device: where torchcodec decodes; pixels are there.

        Raises:
            UnusableSample: a frame of the chunk cannot be decoded exactly.
        """
        with self._opened(device) as frames:
            for start in range(0, len(self.indices), num_frames):
                pixels = frames.pixels(self.indices[start : start + num_frames])
                check_shown_size(self.path, self._decoder, pixels, self._index.shown_size)
                yield replace(self.outline, pixels=pixels)

    def try_ends(self) -> None:
        """Decodes the first and the last frame on the CPU, for whoever leaves all others to an encoder.

        Raises:
            UnusableSample: one of them cannot be decoded exactly.
        """
        ends = sorted({self.indices[0], self.indices[-1]})
        with self._opened(CPU) as frames:
            check_shown_size(self.path, self._decoder, frames.pixels(ends), self._index.shown_size)

    @contextmanager
    def _opened(self, device: torch.device) -> Iterator[DecodesFrames]:
        """The file as its decoder has it."""
        path, index, limits = self.path, self._index, self._limits
        if self._decoder == "pyav":
            with opened_video(path, limits) as (container, stream):
                yield PyAVFrames(path, container, stream, index, limits)
            return
        check_readable(path, index, self._decoder)
        if device.type != "cpu":  # its loader has seen how the frames stand
            yield DeviceFrames(path, index, limits, device)
            return
        frames = (
            DecordFrames(path, index, limits) if self._decoder == "decord" else TorchcodecFrames(path, index, limits)
        )
        if index.orientation != UPRIGHT:
            self._check_turned(frames)
        yield frames

    def _check_turned(self, frames: DecodesFrames) -> None:
        """Compares the first frame with PyAV's: half a turn that was not made is seen in no size.

        decord obeys no display matrix outside of MP4 and MOV, and neither it nor torchcodec one within the stream.
        """
        with opened_video(self.path, self._limits) as (container, stream):
            expected = PyAVFrames(self.path, container, stream, self._index, self._limits).pixels([0])
        if not torch.equal(frames.pixels([0]), expected):
            raise refused(self.path, self._decoder, "it does not turn its picture as the file asks for")


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


def read_frame_index(path: str | Path, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> FrameIndex:
    """The times of a file's frames, from its packets, and how they stand, from its first frame.

    Raises:
        UnusableSample: there are none, they cannot be found by time, or they are more than the limits allow.
    """
    # 1. The packets that are whole; of a broadcast, from the first key frame on.
    scan = _scan_packets(path, limits)
    matrix = scan.display_matrix
    packets = scan.packets
    is_torn = bool(packets) and packets[-1].is_corrupt
    while packets and packets[-1].is_corrupt:
        packets.pop()
    try:
        packets = trim_broadcast(packets) if scan.is_broadcast else packets
        orientation = UPRIGHT if matrix is None else orientation_of(matrix)
    except ValueError as error:
        raise UnusableSample(path, f"{error}; {ENCODE_ANEW}") from error
    if not packets:
        raise UnusableSample(path, "it cannot be decoded (there are no frames in it)")
    if scan.unit_s <= 0 or any(packet.pts is None for packet in packets):
        raise UnusableSample(path, f"{TIMELESS}; {ENCODE_ANEW}")

    # 2. In the order shown, [N] each.
    packets.sort(key=operator.attrgetter("pts"))
    pts, durations, is_key, _, _, positions = (np.array(column) for column in zip(*packets, strict=True))
    if (np.diff(pts) <= 0).any():
        raise UnusableSample(path, f"{TIMELESS}; {ENCODE_ANEW}")
    starts = pts.astype(np.float64) * scan.unit_s
    is_key[0] = True  # there is nothing before it
    keys = np.flatnonzero(is_key)
    last_s = durations[-1] * scan.unit_s or (float(np.median(np.diff(starts))) if len(pts) > 1 else 0.0)
    end_s = float(starts[-1] + last_s)
    limits.check_length(path, end_s - float(starts[0]))

    # 3. What a torn file lacks.
    missing_s = 0.0
    is_short = scan.num_packets < scan.num_declared or end_s - starts[0] < scan.declared_s - MAX_MISSING_S
    if not scan.is_broadcast and (is_torn or is_short):
        with decoder_errors(path):
            missing_s = missing_tail_s(path, limits)
    key_bytes = positions[keys] if scan.is_broadcast else None
    return FrameIndex(
        pts, starts, end_s, keys, scan.size, orientation, scan.has_alpha, key_bytes, scan.in_order, missing_s,
        is_exactly_turned=matrix is None or is_exact(matrix), pixel_format=scan.pixel_format,
    )  # fmt: skip


def known_index(path: str | Path, limits: MediaLimits) -> FrameIndex:
    """As `read_frame_index`, read once per version of the file: of an hour, parts are asked for one after the other."""
    state = os.stat(path)
    return _index_of(str(path), (os.path.abspath(path), state.st_size, state.st_mtime_ns), limits)


@lru_cache(maxsize=4)
def _index_of(path: str, version: tuple[str, int, int], limits: MediaLimits) -> FrameIndex:
    return read_frame_index(path, limits)


def _scan_packets(path: str | Path, limits: MediaLimits) -> PacketScan:
    """One pass over a file, in which the decoder is asked for one frame."""
    packets: list[PacketTimes] = []
    first, num_packets = None, -1  # the last packet is empty
    with opened_video(path, limits) as (container, stream):
        clock = DecodeClock(path, limits)
        for packet in container.demux(stream):
            clock.check()
            num_packets += 1
            limits.check_count(path, num_packets)
            if packet.size and not packet.is_discard:
                flags = packet.is_keyframe, packet.is_corrupt
                packets.append(PacketTimes(packet.pts, packet.duration or 0, *flags, packet.dts, packet.pos or 0))
            if first is None:
                with suppress(av.FFmpegError):  # what is damaged shows when it is sampled
                    first = next(iter(packet.decode()), None)
        unit_s = float(stream.time_base or 0)
        matrix = None if first is None else first.side_data.get(SideData.DISPLAYMATRIX)
        return PacketScan(
            packets=packets,
            num_packets=num_packets,
            num_declared=stream.frames,
            declared_s=stream.duration * unit_s if stream.duration else (container.duration or 0) / av.time_base,
            unit_s=unit_s,
            size=(stream.height, stream.width),
            display_matrix=None if matrix is None else bytes(matrix),
            has_alpha=first is not None and any(part.is_alpha for part in first.format.components),
            pixel_format="" if first is None else first.format.name,
            is_broadcast=container.format.name in BROADCASTS,
            # An AVI stores frames in decoding order and no times at all.
            in_order=container.format.name == "avi" and bool(stream.codec_context.has_b_frames),
        )


def _without_damaged_end(path: str | Path, index: FrameIndex, limits: MediaLimits) -> FrameIndex:
    """The index without the frames of the last two GOPs from the first one on that does not decode."""
    # Two, for what is damaged takes along frames before it that the decoder still holds.
    first, num_frames = int(index.keys[-2:][0]), len(index.pts)
    with opened_video(path, limits) as (container, stream):
        position = FramePosition(container, stream, index, DecodeClock(path, limits))
        damaged = (number for number in range(first, num_frames) if position.advance_to(number) is None)
        return index.first_frames(next(damaged, num_frames))


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
