"""Which frames of a video are read: so many per second or in all, at even times or at even steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
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
    moments: Literal["middles", "ends", "inner", "starts", "whole_steps"] = "middles"
    """Frames on show at the middles of equal spans of time, or frames at equal steps of their number: `ends` with the
    first and the last among them, `linspace(0, N - 1, n)`, as lmms-eval, VILA and Qwen sample; `inner` with neither,
    `int(i N / (n + 1))`, as VLMEvalKit (a number of frames) and Video-MME-v2 sample; `starts` from the first on, every
    1 / fps seconds, as VLMEvalKit samples a rate; `whole_steps` likewise, `int(N / n) i`, as LongVideoBench."""
    rounding: Literal["down", "nearest"] = "down"
    """Of `ends`, where a step falls between two frames: the earlier (lmms-eval, VILA) or the nearer one (Qwen)."""
    rate_rounding: Literal["nearest", "down"] = "nearest"
    """To which whole number of frames `fps` times the duration is rounded; `down` in lmms-eval, VILA and VLMEvalKit."""
    multiple_of: int = 1
    """Number that divides the number of frames, which is rounded down; Qwen's is 2, for a token is of two frames."""
    torn: Literal["skip", "keep"] = "skip"
    """What becomes of a video whose file was cut off, as half a download: its row is skipped and listed, or what is
    there is sampled as a shorter video, as other harnesses do; then the row is listed as used in part."""
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """What turns packets into pixels. Which frames there are, and when, PyAV says whatever decodes them."""
    decode_on: Literal["cpu", "encoder"] = "cpu"
    """With `encoder` torchcodec decodes on the encoder's CUDA device, in its process, and pixels never leave it."""
    at_s: tuple[float, ...] | None = None
    """Only the frames on show at these increasing seconds from the first frame on, whatever the rate: what a selection
    has found for one question, in `span_s` if there is one."""

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
        choices = {
            "torn": ("skip", "keep"), "moments": ("middles", "ends", "inner", "starts", "whole_steps"),
            "rounding": ("down", "nearest"), "rate_rounding": ("nearest", "down"),
            "decoder": ("pyav", "decord", "torchcodec"), "decode_on": ("cpu", "encoder"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.decode_on == "encoder" and self.decoder != "torchcodec":
            raise ValueError(
                f"decode_on=encoder needs decoder=torchcodec, which decodes on GPUs, got {self.decoder}; set either"
            )
        if self.moments != "ends" and self.rounding != "down":
            raise ValueError(
                f"rounding={self.rounding} is of frames from the first to the last, and moments is {self.moments}; set "
                "moments to ends"
            )
        counts = (self.num_frames or 0, self.min_frames, self.max_frames)
        if self.multiple_of < 1 or any(count % self.multiple_of for count in counts):
            raise ValueError(
                f"multiple_of must be at least 1 and divide num_frames, min_frames and max_frames, got "
                f"{self.multiple_of} for {self.num_frames}, {self.min_frames} and {self.max_frames}"
            )
        if self.span_s is not None and not 0 <= self.span_s[0] < self.span_s[1]:
            raise ValueError(f"span_s must be two increasing seconds from 0 on, got {self.span_s}")
        if self.at_s is not None and (not self.at_s or self.at_s[0] < 0 or any(np.diff(self.at_s) <= 0)):
            raise ValueError(f"at_s must be increasing seconds from 0 on, at least one, got {self.at_s}")

    def identity(self) -> dict[str, Any]:
        """All fields by name, but for later ones that have their default: stored answers are found by it."""
        later = {"decoder": "pyav", "decode_on": "cpu", "at_s": None, "rate_rounding": "nearest"}
        return {name: value for name, value in asdict(self).items() if later.get(name, self) != value}


def sample_indices(starts: Sequence[float] | NDArray[np.float64], end_s: float, sampling: VideoSampling) -> list[int]:
    """Indices of the frames on show at the middles of equal spans of time, or at equal steps (`moments: ends`).

    At middles time decides, not the index: where the frame rate varies, a stretch with many frames gets no more than
    its share. A frame on show at several of those moments is taken once, so a video that stands still may give fewer
    frames than `fps` asks for, yet never fewer than `num_frames` or `min_frames` while it has them.

    Args:
        starts: [N] increasing times in seconds at which the frames appear; N >= 1.
        end_s: when the last frame disappears.
        sampling: how many.

    Returns:
        Increasing indices without repeats.
    """
    times = np.asarray(starts, dtype=np.float64)
    if sampling.at_s is not None:  # the millionth: a frame's own time leads to it, however it was rounded
        shown = np.searchsorted(times - times[0], np.asarray(sampling.at_s) + 1e-6, side="right") - 1
        return np.unique(shown).tolist()
    # A span is sampled as a video of its own.
    if sampling.span_s is not None:
        first, last_s = sampling.span_s
        held = slice(max(shown_at(times, times[0] + first), 0), shown_at(times, times[0] + last_s, "left") + 1)
        inside = sample_indices(times[held], min(end_s, times[0] + last_s), replace(sampling, span_s=None))
        return [held.start + index for index in inside]
    # As many frames as the rate asks for, within the limits; all of them where the video has no more.
    duration_s = end_s - times[0]
    count = count_frames(len(times), duration_s, sampling)
    if count >= len(times):
        return list(range(len(times)))
    if sampling.moments == "ends":
        return spread_indices(len(times), count, sampling.rounding)
    if sampling.moments == "inner":
        return inner_indices(len(times), count)
    if sampling.moments == "starts":
        return start_indices(len(times), count, duration_s * (sampling.fps or 0.0))
    if sampling.moments == "whole_steps":
        return [number * (len(times) // count) for number in range(count)]
    # The thousandth keeps a moment that falls on a frame's start on one side of it, however times are rounded.
    moments = times[0] + (np.arange(count) + 0.501) * duration_s / count
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    at_least = count if sampling.num_frames or sampling.multiple_of > 1 else sampling.min_frames
    return chosen.tolist() if len(chosen) >= at_least else fill_gaps(times, chosen.tolist(), at_least)


def count_frames(num_frames: int, duration_s: float, sampling: VideoSampling) -> int:
    """How many frames of a video are sampled, at least one.

    Args:
        num_frames: that it has.
        duration_s: of the video.
        sampling: a rate is rounded as `rate_rounding` says, or down to a number that `multiple_of` divides.
    """
    asked = float(sampling.num_frames or duration_s * (sampling.fps or 0.0))
    step = sampling.multiple_of
    if step == 1 and sampling.rate_rounding == "nearest":
        asked = round(asked)
    # The millionth keeps a whole number that sums of times have missed by a little.
    count = int(min(max(asked, sampling.min_frames), sampling.max_frames, num_frames) + 1e-6)
    return max(count // step * step, min(step, num_frames))


def spread_indices(num_frames: int, count: int, rounding: Literal["down", "nearest"]) -> list[int]:
    """Indices at equal steps from the first frame to the last, `count` of `num_frames`; of one the first.

    Args:
        num_frames: of the video, at least `count`.
        count: how many.
        rounding: `down` as lmms-eval's `np.linspace(0, N - 1, n, dtype=int)`; `nearest` as qwen-vl-utils'
            `torch.linspace(0, N - 1, n).round()`, whose single precision decides where two frames are equally near.
    """
    if rounding == "nearest":
        return torch.linspace(0, num_frames - 1, count).round().long().tolist()
    return np.linspace(0, num_frames - 1, count, dtype=int).tolist()


def inner_indices(num_frames: int, count: int) -> list[int]:
    """Indices at equal steps that leave as much before the first as behind the last, `count` of `num_frames`."""
    step = num_frames / (count + 1)
    return [int(place * step) for place in range(1, count + 1)]


def start_indices(num_frames: int, count: int, asked: float) -> list[int]:
    """Indices at equal steps from the first frame on.

    Args:
        num_frames: of the video.
        count: how many.
        asked: frames that the rate asks for, a fraction of one too, whose steps are kept; where there are to be more or
            fewer of them, steps are those of as many equal parts.
    """
    step = num_frames / (asked if abs(asked - count) < 1 else count)
    return [min(int(place * step + 1e-6), num_frames - 1) for place in range(count)]


def read_span(span: object, name: str = "span_s") -> tuple[float, float]:
    """A row's `metadata["span_s"]`: two increasing seconds.

    Args:
        span: what stands there.
        name: of the field, for the error.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2:
        start, end = span
        if all(isinstance(second, (int, float)) for second in (start, end)) and 0 <= start < end:
            return float(start), float(end)
    raise ValueError(f"in its metadata {name} must be two increasing seconds from 0 on, got {span!r}")


def in_parts(sampling: VideoSampling, parts_s: Any, max_frames: int | None = None) -> VideoSampling:
    """Sampling of nothing but parts of a video, each with its share of the frames and at least one.

    Frames are on show at the middles of equal pieces of a part, as CG-Bench (arXiv:2412.12075) shows the clues to a
    question; a frame on show at several of them is taken once.

    Args:
        sampling: says how many frames there are at most.
        parts_s: [start, end] of each part in seconds: a row's `metadata["parts_s"]`.
        max_frames: fewer than `sampling` says, if given: its `metadata["parts_frames"]`.

    Raises:
        ValueError: a part is no two increasing seconds.
    """
    if not isinstance(parts_s, Sequence) or isinstance(parts_s, str):
        raise ValueError(f"its metadata's parts_s must be a list of [start, end] in seconds, got {parts_s!r}")
    parts = [read_span(part, "each of parts_s") for part in parts_s]
    count = min(sampling.num_frames or sampling.max_frames, max_frames or sampling.max_frames)
    total_s = sum(end - start for start, end in parts)
    moments: set[float] = set()
    for start, end in parts:
        pieces = max(1, int(count * (end - start) / total_s + 1e-6))
        moments |= {start + (end - start) * (piece + 0.5) / pieces for piece in range(pieces)}
    return replace(sampling, at_s=tuple(sorted(moments)))


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
