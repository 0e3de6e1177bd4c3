"""Selections by the video alone: its key frames, its scenes, and where something moves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from longrl.datamodules.selection.candidates import Candidates
from longrl.datamodules.selection.frame_selection import FrameSelection, filled
from longrl.io.number_ranges import SHARE, check_ranges


@dataclass(frozen=True)
class KeyFrames(FrameSelection):
    """The frames at which an encoder began anew, mostly where a scene begins: of many, every so many-th.

    The packets say which they are, so nothing is decoded to choose. Where there are fewer than are shown, candidates
    far from all of them are added.

    Example:
        `data.selection: {class_path: longrl.datamodules.selection.KeyFrames}`
    """

    @override
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        keys = video.key_times
        if len(keys) >= count:
            return keys[((np.arange(count) + 0.5) * len(keys) / count).astype(int)].tolist()
        times = np.union1d(keys, video.times)
        if not len(keys):
            return filled(times, [len(times) // 2], count)
        return filled(times, np.searchsorted(times, keys).tolist(), count)


@dataclass(frozen=True)
class Scenes(FrameSelection):
    """A frame of each scene: the largest changes of the picture cut the video, and the middle of each part is shown.

    A change is the mean absolute difference of two neighbouring candidates as grey pictures of 32 x 32.
    """

    @override
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        return video.times[scene_middles(changes_of(video), count)].tolist()


@dataclass(frozen=True)
class Motion(FrameSelection):
    """More frames where more moves: equal steps of the changes summed up over time, not of time.

    Changes are those of `Scenes`.
    """

    still_share: float = 0.2
    """Share of the frames that goes by time alone, so that a part without motion is not left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.selection.init_args.", still_share=SHARE)

    @override
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        chosen = equal_motion(changes_of(video), count, self.still_share)
        return filled(video.times.tolist(), chosen, count)


def changes_of(video: Candidates) -> NDArray[np.float64]:
    """[C - 1] mean absolute difference of the grey values of each candidate and the one before, 0 to 255."""
    greys = video.greys()
    return np.abs(np.diff(greys, axis=0)).mean(axis=(1, 2), dtype=np.float64)


def scene_middles(changes: NDArray[np.float64], count: int) -> list[int]:
    """Indices of the candidates in the middle of the `count` parts into which the largest changes cut a video.

    Args:
        changes: [C - 1] between neighbouring candidates; of equal ones the earlier cuts.
        count: at most C.
    """
    largest = np.argsort(-changes, kind="stable")[: count - 1]
    edges = [0, *sorted(largest + 1), len(changes) + 1]
    return [int(start + stop - 1) // 2 for start, stop in itertools.pairwise(edges)]


def equal_motion(changes: NDArray[np.float64], count: int, still_share: float) -> list[int]:
    """Indices of candidates at equal steps of the changes summed up; fewer than `count` where a step holds none.

    Args:
        changes: [C - 1] between neighbouring candidates.
        count: how many.
        still_share: share of the sum that every candidate has alike.
    """
    total = changes.sum()
    moving = np.concatenate([[0.0], changes / total]) if total else np.zeros(len(changes) + 1)
    still = still_share if total else 1.0
    weights = (1 - still) * moving + still / len(moving)
    passed = np.cumsum(weights)
    steps = (np.arange(count) + 0.5) * passed[-1] / count
    return np.unique(np.searchsorted(passed, steps)).tolist()
