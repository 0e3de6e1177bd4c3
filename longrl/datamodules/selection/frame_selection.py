"""`FrameSelection`: a function (video, question) -> moments, which decides what frames of a video a question is shown.

Without one, `VideoSampling` alone decides, by time or by number. With one it still says how many frames are shown; the
selection says which, among candidates that are decoded at a small size, and gives them as `VideoSampling.at_s`.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling, fill_gaps
from longrl.datamodules.media.sources import DecodeLimits, open_video
from longrl.datamodules.media.video_parts import ONE_FRAME, VideoPart
from longrl.datamodules.selection.candidates import DEFAULT_LIMITS, KEPT, Candidates
from longrl.io.number_ranges import COUNT, LEAST, MOST, NOT_NEGATIVE, check_ranges
from longrl.types import UnusableSample

MAX_KEPT = 4096
"""Questions of which a process keeps the moments."""
OWN = "longrl."
_CHOSEN: OrderedDict[tuple[Any, ...], tuple[float, ...]] = OrderedDict()
"""Selection, candidates, question and count -> moments."""


@dataclass(frozen=True)
class ShownFrames:
    """What a question is shown of a video."""

    sampling: VideoSampling
    """Of the video itself."""
    part: VideoPart | None = None
    """The video, where it is shown smaller than it is."""
    details: tuple[VideoPart, ...] = ()
    """The images behind it."""
    detail_times: tuple[float, ...] = ()
    """Their seconds."""


@dataclass(frozen=True)
class FrameSelection(abc.ABC):
    """Base of all selections: `choose` is the function, and these options say what it is for.

    Frozen, so that equal options are equal selections; every process must choose alike, for the ranks of a
    sequence-parallel group each decode their part of the frames.
    """

    candidates_fps: float = 1.0
    """Frames per second that are looked at."""
    max_candidates: int = 1024
    """Of a longer video so many, farther apart."""
    detail_frames: int = 0
    """Above 0 the video is shown as `data.video` samples it, and the moments are shown behind it as so many images,
    each behind its time: many small frames and a few large ones in one prompt."""
    detail_pixels: int | None = None
    """Those images have at most so many pixels; None leaves it to the family."""
    overview_pixels: int | None = None
    """With `detail_frames` the frames of the video have at most so many pixels; None leaves it to the family."""

    reads_question: ClassVar[bool] = False
    """True if what is chosen depends on the question."""
    not_in_identity: ClassVar[tuple[str, ...]] = ()
    """Options that decide nothing of what is chosen."""

    def __post_init__(self) -> None:
        where = "data.selection.init_args."
        check_ranges(self, where, candidates_fps=(LEAST, MOST), max_candidates=COUNT, detail_frames=NOT_NEGATIVE)
        check_ranges(self, where, detail_pixels=COUNT, overview_pixels=COUNT)
        for name in ("detail_pixels", "overview_pixels"):
            if getattr(self, name) is not None and not self.detail_frames:
                raise ValueError(
                    f"{where}{name}={getattr(self, name)} is of a video with images behind it; set detail_frames to "
                    "their number, or leave it out"
                )

    def check(self) -> None:  # noqa: B027  # by default there is nothing
        """Raises ValueError where what it needs is missing; called before weights are loaded."""

    @abc.abstractmethod
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        """The moments of a video that a question is shown.

        Args:
            video: its candidates, more than `count`.
            question: without its options; "" where none is asked.
            count: how many moments.

        Returns:
            Seconds from the video's first frame on, in any order; fewer than `count` are shown as they are.
        """

    def shown_frames(
        self,
        path: str,
        question: str,
        sampling: VideoSampling,
        limits: DecodeLimits = DEFAULT_LIMITS,
        remote: RemoteMedia = NO_REMOTE,
    ) -> ShownFrames:
        """What a question is shown of a video: as many frames as `sampling` would take, or these and details.

        A video without more candidates than that is sampled as without a selection.

        Args:
            path: of a local file or list of frames.
            question: as `choose` is given it.
            sampling: how many frames, and of which span.
            limits: of decoding.
            remote: of a list's frames.

        Raises:
            UnusableSample: the video cannot be read, or what was chosen is no moment of it.
        """
        video = Candidates(path, sampling, self.candidates_fps, self.max_candidates, limits, remote)
        if not self.detail_frames:
            count = len(open_video(path, sampling, remote=remote, limits=limits.media).outline.timestamps)
            if count >= len(video):
                return ShownFrames(sampling)
            return ShownFrames(replace(sampling, at_s=self._moments(video, question, count)))
        count = min(self.detail_frames, len(video))
        moments = tuple(video.times.tolist()) if count == len(video) else self._moments(video, question, count)
        one = replace(ONE_FRAME, torn=sampling.torn, decoder=sampling.decoder)
        large = VideoPart(path, one, True, None, self.detail_pixels, limits, remote)
        details = tuple(replace(large, sampling=replace(one, at_s=(moment,))) for moment in moments)
        small = None
        if self.overview_pixels is not None:
            small = VideoPart(path, sampling, False, None, self.overview_pixels, limits, remote)
        return ShownFrames(sampling, small, details, moments)

    def identity(self) -> dict[str, Any]:
        """All that decides what is chosen, as plain values; of a class of the user's own also its file's content."""
        kind = type(self)
        values = {"name": kind.__name__, **asdict(self)}
        if not kind.__module__.startswith(OWN):
            values["file"] = source_digest(kind)
        return {name: value for name, value in values.items() if name not in self.not_in_identity}

    def _moments(self, video: Candidates, question: str, count: int) -> tuple[float, ...]:
        """As `choose`, kept, checked and in order."""
        name = self, video.key, video.span_s, question if self.reads_question else "", count
        if name not in _CHOSEN:
            _CHOSEN[name] = checked_moments(self.choose(video, question, count), video, count)
        _CHOSEN.move_to_end(name)
        while len(_CHOSEN) > MAX_KEPT:
            _CHOSEN.popitem(last=False)
        return _CHOSEN[name]


def forget() -> None:
    """Lets go of all that this process keeps of candidates and of what was chosen."""
    _CHOSEN.clear()
    KEPT.clear()


def checked_moments(chosen: Sequence[float], video: Candidates, count: int) -> tuple[float, ...]:
    """Increasing moments without repeats.

    Raises:
        UnusableSample: there are none or too many, or one lies outside of what is asked about.
    """
    moments = sorted({float(moment) for moment in chosen})
    start_s, end_s = video.span_s
    first_s = min(start_s, float(video.times[0]))  # the frame on show when a span begins appeared before it
    if not 1 <= len(moments) <= count or not all(first_s <= moment <= end_s for moment in moments):
        raise UnusableSample(
            video.path,
            f"a selection must choose 1 to {count} moments between {first_s:g} and {end_s:g} s, got {moments[:8]}",
        )
    return tuple(moments)


def filled(times: Sequence[float] | NDArray[np.float64], chosen: Sequence[int], count: int) -> list[float]:
    """Times of chosen frames and, until they are `count`, of those farthest from all that are chosen."""
    every = np.asarray(times, dtype=np.float64)
    numbers = sorted(set(map(int, chosen)))
    if len(numbers) < count:
        numbers = fill_gaps(every, numbers, count)
    return every[numbers].tolist()


def source_digest(function: Callable[..., Any]) -> str:
    """Sha256 of the file in which a function or class is written."""
    file = inspect.getsourcefile(function)
    assert file is not None, "it was read from a file"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
