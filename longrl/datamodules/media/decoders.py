"""Decoders beside PyAV, decord and torchcodec: the same frames, or the file is refused.

Which frames a file has, when they appear and how they stand, `FrameIndex` says whatever decodes them. What a decoder
makes of a file is held against it: number, times and key frames, and of torchcodec the time of every frame. Both open
files by FFmpeg libraries of their own, to which nobody can say which protocols and formats are allowed. So only files
come to them that PyAV has scanned by the rules of `opening` and that begin as one of `SIGNATURES`, as no playlist does.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import torch
from torch import Tensor

from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.opening import DecodeClock, MediaLimits
from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import UnusableSample

REMEDY = "data.video.decoder=pyav can"
SIGNATURES = re.compile(rb"....(ftyp|moov|mdat|free|skip|wide|pnot)|\x1a\x45\xdf\xa3|RIFF....AVI ", re.DOTALL)
"""First bytes of MP4 and MOV, Matroska and WebM, and AVI; in FLV, say, both end a seek behind the frame."""
PIXEL_FORMATS = (
    "yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray", "rgb24", "gbrp",
)  # fmt: skip
"""Those that all decoders turn to the same RGB, whatever matrix and range a file names. Of others, and of more than 8
bits, each fills in colours its own way: 10 bits of grainy drawings differ by 5 to 8 levels in the mean."""
LOG_PREFIX = re.compile(r"^\[[\d:]+\] \S+: ")
"""decord's errors begin with the time of day and a line of its source; reasons are the same in every run."""
TIME_ERROR_S = 1e-3
"""decord tells times in single precision."""
CPU = torch.device("cpu")


class DecodesFrames(Protocol):
    """A video file that is open."""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[F, 3, H, W] uint8 RGB of frames by their numbers in the index, upright and in the file's own size.

        Args:
            indices: increasing, and above those of earlier calls; decord and torchcodec go back, too.

        Raises:
            UnusableSample: one of them cannot be decoded exactly, or decoding takes longer than the limits allow.
        """


def decoder_version(sampling: VideoSampling) -> str:
    """Name and version of what decodes, as keys and stored answers have it.

    Raises:
        ImportError: its package is not there, or does not load.
    """
    if sampling.decoder == "pyav":
        return f"PyAV {av.__version__}"
    if sampling.decoder == "decord":
        return f"decord {_decord().__version__}"
    torchcodec = _torchcodec()
    version = torchcodec.__version__.partition("+")[0]  # CPU and CUDA builds give the same on the CPU
    where = " NVDEC" if sampling.decode_on == "encoder" else ""
    return f"torchcodec {version} FFmpeg {torchcodec.ffmpeg_major_version}{where}"


def check_decoder(sampling: VideoSampling, has_encoder: bool = True) -> None:
    """Raises, before weights are loaded, where a decoder is not installed, or is to use a device that is not there.

    Args:
        sampling: says which decoder.
        has_encoder: frames are encoded here; an endpoint encodes them elsewhere.

    Raises:
        ImportError: see `decoder_version`.
        ValueError: it is to decode on the encoder's device, and there is no CUDA, or no encoder.
    """
    decoder_version(sampling)
    if sampling.decode_on == "encoder" and not has_encoder:
        raise ValueError(
            "data.video.decode_on=encoder needs an encoder in this process, and there is none; set it to cpu"
        )
    if sampling.decode_on == "encoder" and not torch.cuda.is_available():
        raise ValueError("data.video.decode_on=encoder decodes on a CUDA device, and there is none here; set it to cpu")


def check_readable(path: str | Path, index: FrameIndex, decoder: str) -> None:
    """Raises UnusableSample for a file that another decoder than PyAV would read wrongly, or must not open."""
    is_other = index.pixel_format not in PIXEL_FORMATS
    reasons = {
        "it is a recording of a broadcast, in which it finds no frame for sure": index.key_bytes is not None,
        "its frames have no times": index.in_order,
        "it was cut off": index.missing_s > 0,
        "it has transparent pixels": index.has_alpha,
        f"its pixels are {index.pixel_format}, of which it makes other colours": is_other,
        "its picture is mirrored": index.orientation.is_mirrored,
        "its picture is to be turned by a little more or less than a right angle": not index.is_exactly_turned,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise refused(path, decoder, reason)
    with open(path, "rb") as file:
        if not SIGNATURES.match(file.read(12)):
            raise refused(path, decoder, "it does not begin as MP4, MOV, Matroska, WebM or AVI do")


class DecordFrames:
    """decord's frames of a file; see `DecodesFrames`.

    Raises:
        UnusableSample: it finds other frames in the file than the index has.
    """

    def __init__(self, path: str | Path, index: FrameIndex, limits: MediaLimits) -> None:
        decord = _decord()
        self._path = path
        self._bridge = decord.bridge.use_torch
        self._clock = DecodeClock(path, limits, time.process_time)  # it decodes in a thread of its own
        # The smallest share of frames that may be copies of their neighbours: 0 would be no limit.
        self._reader = self._done(
            lambda: decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-12)
        )
        self._compare(index)

    def _compare(self, index: FrameIndex) -> None:
        """What it found, with the index."""
        if len(self._reader) != len(index.pts):
            raise refused(self._path, "decord", f"it finds {len(self._reader)} frames, PyAV {len(index.pts)}")
        times = np.asarray(self._reader.get_frame_timestamp(range(len(index.pts))), np.float64)[:, 0]
        if not np.allclose(times, index.starts - index.starts[0], rtol=1e-6, atol=TIME_ERROR_S):
            raise refused(self._path, "decord", "it tells other times of its frames")
        # It counts them as they are stored, and would be wrong where frames before a key frame are stored behind it.
        if not np.array_equal(self._reader.get_key_indices(), index.keys):
            raise refused(self._path, "decord", "its key frames do not stand alone (open GOPs)")

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """See `DecodesFrames`."""
        self._clock.start()
        frames = []
        with self._bridge():
            for index in indices:
                frames.append(self._done(functools.partial(self._reader.get_batch, [index])))
                self._clock.check()
        return torch.cat(frames).permute(0, 3, 1, 2)

    def _done(self, call: Callable[[], Any]) -> Any:
        """What a call of decord gives."""
        try:
            return call()
        except Exception as error:
            raise _failed(self._path, "decord", error) from error


class TorchcodecFrames:
    """torchcodec's frames of a file; see `DecodesFrames`.

    Args:
        path: of the file.
        index: its frames.
        limits: what decoding may cost; what a GPU does is not counted.
        device: where it decodes and the pixels are; a CUDA device decodes by NVDEC, and its pixels never leave it.

    Raises:
        UnusableSample: it finds other frames in the file than the index has.
    """

    def __init__(self, path: str | Path, index: FrameIndex, limits: MediaLimits, device: torch.device = CPU) -> None:
        from torchcodec.decoders import VideoDecoder

        self._path = path
        self._index = index
        self._clock = DecodeClock(path, limits)
        try:
            self._decoder = VideoDecoder(os.path.abspath(path), num_ffmpeg_threads=1, device=str(device))
        except Exception as error:
            raise _failed(path, "torchcodec", error) from error
        if len(self._decoder) != len(index.pts):
            raise refused(path, "torchcodec", f"it finds {len(self._decoder)} frames, PyAV {len(index.pts)}")

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """See `DecodesFrames`."""
        self._clock.start()
        try:
            batch = self._decoder.get_frames_at(list(indices))
        except Exception as error:
            raise _failed(self._path, "torchcodec", error) from error
        self._clock.check()
        # Times are on the CPU wherever the pixels are.
        if not np.allclose(batch.pts_seconds.numpy(), self._index.starts[list(indices)], rtol=0, atol=1e-6):
            raise refused(self._path, "torchcodec", "it gives other frames than those asked for")
        return batch.data

    @property
    def is_left_to_cpu(self) -> bool:
        """True if torchcodec decodes on the CPU though it was to use a GPU; known behind the first frames."""
        return bool(self._decoder.cpu_fallback)


def check_shown_size(path: str | Path, decoder: str, pixels: Tensor, expected: tuple[int, int]) -> None:
    """Raises UnusableSample for frames of another size: a decoder that does not know how they stand, say."""
    found = tuple(pixels.shape[2:])
    if found != expected:
        raise refused(path, decoder, f"it gives frames of {found} pixels, not {expected}")


def refused(path: str | Path, decoder: str, reason: str) -> UnusableSample:
    """The sample of a file that a decoder would not give exactly."""
    return UnusableSample(path, f"{decoder} cannot be trusted with it ({reason}); {REMEDY}")


def _failed(path: str | Path, decoder: str, error: Exception) -> UnusableSample:
    """What becomes of an error of a decoder."""
    if isinstance(error, UnusableSample):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # the machine's, whatever the file
        raise error
    said = LOG_PREFIX.sub("", _first_line(error))[:300]
    return UnusableSample(path, f"{decoder} cannot decode it ({type(error).__name__}: {said}); perhaps {REMEDY}")


@functools.cache
def _decord() -> Any:
    # It puts a neighbour in the place of a frame that it does not get, unless this says that it may not: read when it
    # is first imported.
    os.environ["DECORD_REWIND_RETRY_MAX"] = "-1"
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"data.video.decoder=decord needs the package decord ({_first_line(error)}); pip install 'longrl[decord]' "
            "(Linux x86-64 and Windows alone), or set it to pyav"
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


@functools.cache
def _torchcodec() -> Any:
    try:
        import torchcodec

        if torchcodec.ffmpeg_major_version is None:  # newer ones load without FFmpeg, and fail at the first file
            raise ImportError("FFmpeg's libraries are not found")
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"data.video.decoder=torchcodec needs torchcodec and FFmpeg's shared libraries ({_first_line(error)}); pip "
            "install 'longrl[torchcodec]' and install FFmpeg (docs/media.md), or set it to pyav"
        ) from error
    return torchcodec


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
