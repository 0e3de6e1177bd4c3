"""Files of media from strangers: what may be opened, how large it may be, and what goes wrong.

FFmpeg reads whatever a file claims to be: a text that names other files and addresses is a playlist to it, whatever its
suffix. So containers are opened by the protocol `file` alone, and only in formats that hold what they show.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from longrl.types import UnusableSample

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc",
    "vvc", "av1", "obu", "ivf", "asf", "ogg", "nut", "mxf", "dv", "rm", "gif", "apng", "yuv4mpegpipe",
    "wav", "w64", "mp3", "aac", "flac", "aiff", "au", "caf", "amr", "ac3", "eac3", "dts", "ape", "tta", "wv", "opus",
)  # fmt: skip
"""FFmpeg's names of formats that may be opened. None of them names another file that would be read."""
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")
"""Pillow's names of formats that may be opened. Others run programs (EPS runs Ghostscript) or are no pictures."""
PADDING = 8
"""Frames are stored with up to an eighth more pixels than they show."""
READ_S = 60.0
"""Seconds that one call of FFmpeg may take at least: a disk may be slow."""
MAX_FRAMES = 1 << 22
"""19 hours at 60 frames per second; their times take 1 GiB while a file is read."""


@dataclass(frozen=True)
class MediaLimits:
    """What one file of a row may cost; a row with one that costs more is skipped.

    Example:
        `data.media_limits: {max_pixels: 9000000, max_s: 7200}`: 4K and two hours, at most.
    """

    max_pixels: int = 1 << 26
    """Of a picture or a frame of a video: 8192 x 8192. An RGB picture of so many takes 192 MiB."""
    max_s: float = 43_200.0
    """Length of a video or a sound in seconds: 12 hours. Sound takes 64 kB of memory a second."""
    max_decode_s: float = 1_800.0
    """Seconds of one CPU core for one pass over a file. Waiting for a disk or for other processes does not count, so
    a busy machine skips no more rows than an idle one."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_s", "max_decode_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"data.media_limits.{name} must be above 0, got {value}")

    def check_size(self, path: str | Path, width: int, height: int) -> None:
        """Raises UnusableSample for a picture of too many pixels."""
        if width * height > self.max_pixels:
            raise UnusableSample(
                path,
                f"its pictures have {width} x {height} pixels, more than data.media_limits.max_pixels="
                f"{self.max_pixels}; make them smaller, or raise it",
            )

    def check_length(self, path: str | Path, length_s: float) -> None:
        """Raises UnusableSample for a video or sound that lasts too long."""
        if length_s > self.max_s:
            raise UnusableSample(
                path,
                f"it lasts {length_s:.0f} s, longer than data.media_limits.max_s={self.max_s:g}; cut it, or raise it",
            )

    def check_count(self, path: str | Path, num_frames: int) -> None:
        """Raises UnusableSample for a video of too many frames."""
        if num_frames > MAX_FRAMES:
            raise UnusableSample(path, f"it has more than {MAX_FRAMES} frames; cut it into parts")


DEFAULT_MEDIA_LIMITS = MediaLimits()


class DecodeClock:
    """Seconds of CPU that a pass over a file has taken so far.

    Args:
        path: of the file.
        limits: how many it may take.
        cpu_s: the clock; by default that of this thread, in which decoders run that have one.
    """

    def __init__(self, path: str | Path, limits: MediaLimits, cpu_s: Callable[[], float] = time.thread_time) -> None:
        self.path = path
        self._cpu_s = cpu_s
        self.limit_s = limits.max_decode_s
        self.spent_s = 0.0
        self.start()

    def start(self) -> None:
        """Begins to count; what was done since the last `check` is not counted."""
        self._since = self._cpu_s()

    def check(self) -> None:
        """Counts what was done since `start` or the last call.

        Raises:
            UnusableSample: it is more than allowed.
        """
        now = self._cpu_s()
        self.spent_s += now - self._since
        self._since = now
        if self.spent_s > self.limit_s:
            raise UnusableSample(
                self.path,
                f"decoding it takes more than data.media_limits.max_decode_s={self.limit_s:g} s; make a smaller file "
                "of it, or raise it",
            )


@functools.cache
def picture_formats() -> tuple[str, ...]:
    """Those of `PICTURES` that this Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in PICTURES if name in Image.OPEN)


def open_container(path: str | Path, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> Any:
    """A file of video or sound, opened by PyAV; no other file and no address is reached through it.

    Raises:
        UnusableSample: its format is none of `CONTAINERS`: a playlist, say.
        av.FFmpegError: it is damaged, or no medium.
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(CONTAINERS),
        "max_pixels": str(_padded(limits)),  # of the frames that tell what a stream is
    }
    try:
        # A name with a colon, as 10:30.mp4, is no protocol either. A call that reads for ever ends, too.
        return av.open(f"file:{path}", options=options, timeout=max(limits.max_decode_s, READ_S))
    except av.ArgumentError as error:
        raise UnusableSample(
            path, f"its format is none that is read of rows: it may be a playlist, which names other files ({error})"
        ) from error


def open_decoder(path: str | Path, stream: Any, limits: MediaLimits = DEFAULT_MEDIA_LIMITS) -> None:
    """Prepares a video stream: one thread, since loader workers are many, and nothing damaged is painted over.

    Raises:
        UnusableSample: its frames are too large.
    """
    limits.check_size(path, stream.width, stream.height)
    stream.codec_context.thread_count = 1
    # Frames may also become larger on the way.
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(_padded(limits))}


def _padded(limits: MediaLimits) -> int:
    return min(limits.max_pixels + limits.max_pixels // PADDING, (1 << 31) - 1)


@contextmanager
def decoder_errors(path: str | Path) -> Iterator[None]:
    """Turns whatever a decoder raises into `UnusableSample`."""
    try:
        yield
    except UnusableSample:
        raise
    except av.ExitError as error:
        raise UnusableSample(path, "it keeps its reader waiting; is its disk there?") from error
    except Exception as error:
        # FFmpeg says so of a file that claims what no machine has.
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        raise UnusableSample.because(error, "it cannot be decoded", path) from error
