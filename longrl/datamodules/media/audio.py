"""Files to `AudioClip`: wav, mp3, flac and whatever else PyAV reads, and the sound tracks of videos.

Runs in loader workers. What cannot be read as it is raises `UnusableSample`; silence is never put in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.datamodules.media.frame_index import MAX_MISSING_S
from longrl.datamodules.media.opening import (
    DEFAULT_MEDIA_LIMITS,
    DecodeClock,
    MediaLimits,
    decoder_errors,
    open_container,
)
from longrl.datamodules.media.video import content_digest
from longrl.types import FULL_SHARD, AudioClip, FrameShard, UnusableSample

if TYPE_CHECKING:
    from av.container import InputContainer

SAMPLING_RATE = 16_000
"""Samples per second: what Whisper's spectrogram, and every model built on it, is computed from."""
MIN_SECONDS = 0.1
"""Less gives a model no token, or one."""
ESTIMATED = {"mp3", "aac"}
"""Containers without an index: their duration is a guess from the bit rate."""


@dataclass(frozen=True)
class FileSound:
    """An `AudioClip.source` that decodes a file."""

    path: str
    shard: FrameShard
    torn: Literal["skip", "keep"] = "skip"
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS

    def __call__(self) -> Iterator[AudioClip]:
        """The sound, whole."""
        yield read_sound(self.path, self.shard, self.torn, self.limits)


def read_sound(
    path: str | Path,
    shard: FrameShard = FULL_SHARD,
    torn: Literal["skip", "keep"] = "skip",
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
) -> AudioClip:
    """The first sound track of a file, as one channel at 16 kHz.

    Time 0 is the video's first frame if the file has a video: a track that starts later begins with silence, one that
    starts earlier is cut there.

    Args:
        path: a file of any format that PyAV reads: wav, mp3, flac, ogg, m4a, mp4, mkv.
        shard: which part of its features this rank encodes; all ranks decode the whole.
        torn: `keep` takes a file that was cut off for as long as it is, as `VideoSampling.torn`.
        limits: what the file may cost.

    Raises:
        UnusableSample: no such file, no sound track, a torn one, less than 0.1 s of it, or more than the limits allow.
    """
    import av

    digest = content_digest(path)
    if torn == "skip":
        _refuse_torn_wav(path)
    with decoder_errors(path), open_container(path, limits) as container:
        if not container.streams.audio:
            raise UnusableSample(
                path,
                "it has no sound track; leave such videos out, or show videos without theirs: "
                "model.family.init_args.use_audio_in_video=false",
            )
        samples = _decoded(container, path, torn == "keep", limits)
    if len(samples) < MIN_SECONDS * SAMPLING_RATE:
        raise UnusableSample(path, f"it has {len(samples) / SAMPLING_RATE:.3f} s of sound, less than {MIN_SECONDS} s")
    key = hashlib.sha256(f"audio {digest} PyAV {av.__version__} {SAMPLING_RATE}".encode()).hexdigest()
    return AudioClip(torch.from_numpy(samples), len(samples), key, shard=shard)


def _decoded(container: InputContainer, path: str | Path, keeps_torn: bool, limits: MediaLimits) -> NDArray[np.float32]:
    """[S] samples of the first sound track."""
    import av

    stream = container.streams.audio[0]
    resampler = av.AudioResampler(format="fltp", rate=SAMPLING_RATE)
    parts: list[NDArray[np.float32]] = []
    start_s, length_s = None, 0.0
    clock = DecodeClock(path, limits)
    packets = (packet for packet in container.demux(stream) if not (keeps_torn and packet.is_corrupt))
    for frame in (frame for packet in packets for frame in packet.decode()):
        if start_s is None:
            start_s = frame.time or 0.0
        length_s += frame.samples / frame.sample_rate
        clock.check()
        limits.check_length(path, length_s)
        frame.pts = None  # samples follow one another; gaps in the time stamps are not filled
        # the mean, as in qwen-omni-utils and vLLM; FFmpeg's own mono is louder
        parts += [resampled.to_ndarray().mean(0) for resampled in resampler.resample(frame)]
    if start_s is None:
        raise UnusableSample(path, "its sound track is empty")
    if not keeps_torn and stream.duration is not None and container.format.name not in ESTIMATED:
        promised_s = float(stream.duration * (stream.time_base or 0))
        if length_s < promised_s - MAX_MISSING_S:
            raise UnusableSample(
                path, f"its sound ends after {length_s:.1f} s, though it should last {promised_s:.1f} s"
            )
    parts += [resampled.to_ndarray().mean(0) for resampled in resampler.resample(None)]
    return _from_first_frame(np.concatenate(parts), start_s, container)


def _refuse_torn_wav(path: str | Path) -> None:
    """FFmpeg takes a wav for as long as it is; its header knows better, unless it was written into a pipe."""
    with open(path, "rb") as file:
        head = file.read(12)
        held = file.seek(0, 2)
    promised = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and head[8:] == b"WAVE" and held < promised < 1 << 32:
        raise UnusableSample(path, f"it has {held} bytes, though its header says {promised}: it is torn")


def _from_first_frame(samples: NDArray[np.float32], start_s: float, container: InputContainer) -> NDArray[np.float32]:
    """The samples from the time of the first video frame on."""
    starts = [
        stream.start_time * stream.time_base
        for stream in container.streams.video
        if stream.start_time is not None and stream.time_base is not None
    ]
    if not starts or container.streams.video[0].frames == 1:  # no video, or the picture on a record's sleeve
        return samples
    late = round((start_s - float(starts[0])) * SAMPLING_RATE)
    return samples[-late:] if late < 0 else np.concatenate([np.zeros(late, np.float32), samples])
