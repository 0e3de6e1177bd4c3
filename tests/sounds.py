"""Files with sound that several tests share, written by PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {".wav": "pcm_s16le", ".flac": "flac", ".mp3": "libmp3lame", ".mp4": "aac", ".mkv": "flac"}


def tone(seconds: float, hertz: float = 440.0, rate: int = 16_000) -> np.ndarray:
    """[S] float32 of a sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray, rate: int = 16_000, layout: str = "mono") -> Path:
    """[S] or [channels, S] samples as a file of the format its suffix names."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate, layout=layout)
        _encode(container, stream, np.atleast_2d(samples), rate, layout, 0.0)
    return path


def write_clip(
    path: Path, seconds: float, sound_s: float | None = None, late_s: float = 0.0, hertz: float = 440.0, fps: int = 4
) -> Path:
    """A grey 56 x 56 video that gets brighter, with a tone of `sound_s` that starts `late_s` after it."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width = video.height = 56
        video.pix_fmt, video.options = "yuv420p", {"preset": "ultrafast", "threads": "1"}
        audio = None if sound_s is None else container.add_stream(CODECS[path.suffix], rate=16_000, layout="mono")
        for number in range(round(seconds * fps)):
            grey = np.full((56, 56, 3), 10 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, "rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            _encode(container, audio, tone(sound_s, hertz)[None], 16_000, "mono", late_s)
    return path


def _encode(container: Any, stream: Any, samples: np.ndarray, rate: int, layout: str, late_s: float) -> None:
    whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    whole.sample_rate, whole.pts, whole.time_base = rate, round(late_s * rate), Fraction(1, rate)
    container.mux(stream.encode(whole))
    container.mux(stream.encode(None))
