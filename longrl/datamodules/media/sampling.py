"""Which frames of a video are read: so many per second or in all, at even times."""

from __future__ import annotations

from dataclasses import dataclass


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
