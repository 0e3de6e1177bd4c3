"""Which frames of a video are read: so many per second or in all, at even times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are read: so many per second, or so many in all.

    Example:
        `VideoSampling(fps=2.0, max_frames=256)` or `VideoSampling(fps=None, num_frames=64)`
    """

    fps: float | None = 2.0
    """Frames per second of video; None when `num_frames` says how many."""
    num_frames: int | None = None
    """The same number for every video."""
    min_frames: int = 4
    """Fewer only if the video has fewer."""
    max_frames: int = 768
    """Longer videos are sampled more thinly."""
    span_s: tuple[float, float] | None = None
    """Only what is on show between these seconds of a video; a row's `metadata["span_s"]` takes its place."""
    torn: Literal["skip", "keep"] = "skip"
    """What becomes of a video whose file was cut off, as half a download: its row is skipped and listed, or what is
    there is sampled as a shorter video, as other harnesses do; then the row is listed as used in part."""

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.num_frames is None):
            raise ValueError(
                f"set either fps or num_frames, got fps={self.fps} and num_frames={self.num_frames}; "
                "for a fixed number of frames set fps to null"
            )
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"frames must satisfy 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}"
            )
        if self.num_frames is not None and not self.min_frames <= self.num_frames <= self.max_frames:
            raise ValueError(
                f"num_frames={self.num_frames} must lie between min_frames={self.min_frames} and "
                f"max_frames={self.max_frames}; change one of the three"
            )
        if self.torn not in ("skip", "keep"):
            raise ValueError(f"torn must be skip or keep, got {self.torn!r}")
        if self.span_s is not None and not 0 <= self.span_s[0] < self.span_s[1]:
            raise ValueError(f"span_s must be two increasing seconds from 0 on, got {self.span_s}")


def read_span(span: object) -> tuple[float, float]:
    """A row's `metadata["span_s"]`: two increasing seconds.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2:
        start, end = span
        if all(isinstance(second, (int, float)) for second in (start, end)) and 0 <= start < end:
            return float(start), float(end)
    raise ValueError(f"its metadata's span_s must be two increasing seconds from 0 on, got {span!r}")


def shown_at(times: NDArray[np.float64], moment: float, side: Literal["left", "right"] = "right") -> int:
    """Index of the frame on show at a moment, and with "left" right before it."""
    return int(np.searchsorted(times, moment, side=side)) - 1


def fill_gaps(times: NDArray[np.float64], chosen: list[int], at_least: int) -> list[int]:
    """Adds the frame farthest in time from all chosen ones until there are `at_least`."""
    distance = np.abs(times[:, None] - times[chosen]).min(axis=1)  # [N]
    chosen = list(chosen)
    while len(chosen) < at_least:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(times - times[chosen[-1]]))
    return sorted(chosen)
