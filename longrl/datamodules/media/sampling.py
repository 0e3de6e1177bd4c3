"""Which frames of a video are read: so many per second or in all, at even times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        if self.span_s is not None and not 0 <= self.span_s[0] < self.span_s[1]:
            raise ValueError(f"span_s must be two increasing seconds from 0 on, got {self.span_s}")


def sample_indices(starts: Sequence[float] | NDArray[np.float64], end_s: float, sampling: VideoSampling) -> list[int]:
    """Indices of the frames on show at the middles of equal spans of time.

    Time decides, not the index: where the frame rate varies, a stretch with many frames gets no more than its share. A
    frame on show at several of those moments is taken once, so a video that stands still may give fewer frames than
    `fps` asks for, yet never fewer than `num_frames` or `min_frames` while it has them.

    Args:
        starts: [N] increasing times in seconds at which the frames appear; N >= 1.
        end_s: when the last frame disappears.
        sampling: how many.

    Returns:
        Increasing indices without repeats.
    """
    times = np.asarray(starts, dtype=np.float64)
    # A span is sampled as a video of its own.
    if sampling.span_s is not None:
        first, last_s = sampling.span_s
        held = slice(max(_shown_at(times, times[0] + first), 0), _shown_at(times, times[0] + last_s, "left") + 1)
        inside = sample_indices(times[held], min(end_s, times[0] + last_s), replace(sampling, span_s=None))
        return [held.start + index for index in inside]
    # As many frames as the rate asks for, within the limits; all of them where the video has no more.
    duration_s = end_s - times[0]
    count = sampling.num_frames or round(duration_s * (sampling.fps or 0.0))
    count = min(max(count, sampling.min_frames), sampling.max_frames)
    if count >= len(times):
        return list(range(len(times)))
    # The thousandth keeps a moment that falls on a frame's start on one side of it, however times are rounded.
    moments = times[0] + (np.arange(count) + 0.501) * duration_s / count
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    at_least = sampling.num_frames or sampling.min_frames
    return chosen.tolist() if len(chosen) >= at_least else _fill_gaps(times, chosen.tolist(), at_least)


def _shown_at(times: NDArray[np.float64], moment: float, side: Literal["left", "right"] = "right") -> int:
    """Index of the frame on show at a moment, and with "left" right before it."""
    return int(np.searchsorted(times, moment, side=side)) - 1


def _fill_gaps(times: NDArray[np.float64], chosen: list[int], at_least: int) -> list[int]:
    """Adds the frame farthest in time from all chosen ones until there are `at_least`."""
    distance = np.abs(times[:, None] - times[chosen]).min(axis=1)  # [N]
    chosen = list(chosen)
    while len(chosen) < at_least:
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(times - times[chosen[-1]]))
    return sorted(chosen)
