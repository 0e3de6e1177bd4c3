"""Where a video is cut into clips: every so many seconds, or at the scene changes nearest to that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longrl.pipeline.video_frames import Times, decode_frames

SIDE = 32
"""Pixels of the grey pictures that are compared."""
NUM_AROUND = 12
"""Differences before and after one that it is compared with."""


def cut_clips(times: Times, clip_s: float, min_clip_s: float, scenes: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Clips as [first, stop) frame indices; they cover the video without gap or overlap.

    A clip ends at the scene change nearest to `clip_s` after its start, if one lies between half and one and a half of
    it; else at the first frame that appears `clip_s` or later. A last clip shorter than `min_clip_s` joins the one
    before it.

    Args:
        times: of the frames.
        clip_s: expected length in seconds.
        min_clip_s: shortest last clip in seconds.
        scenes: increasing indices of the frames that begin a scene.
    """
    edges = [0]
    while True:
        target = times.start(edges[-1]) + clip_s
        if target >= times.end_s - 1e-6:
            break
        distances = [(abs(times.start(index) - target), index) for index in scenes if index > edges[-1]]
        distance, edge = min(distances, default=(math.inf, 0))
        if distance > clip_s / 2 + 1e-6:  # no scene near enough
            edge = max(times.at(target), edges[-1] + 1)
        if edge >= len(times.starts):
            break
        edges.append(edge)
    if len(edges) > 1 and times.end_s - times.start(edges[-1]) < min_clip_s - 1e-6:
        edges.pop()
    return list(zip(edges, [*edges[1:], len(times.starts)], strict=True))


def scene_starts(path: str, times: Times, threshold: float) -> list[int]:
    """Indices of the frames that begin a scene, by the difference to the frame before.

    Args:
        path: of the video; all its frames are decoded.
        times: of the frames.
        threshold: mean absolute difference of grey values, 0 to 255, from which a frame begins a scene. It must also
            be three times the median of the differences around it, so that a moving camera makes no scenes.
    """
    kept, changes = [], []
    before: NDArray[np.int16] | None = None
    for index, frame in decode_frames(path, range(len(times.starts)), times):
        grey = frame.reformat(width=SIDE, height=SIDE, format="gray").to_ndarray().astype(np.int16)
        if before is not None:
            kept.append(index)
            changes.append(float(np.abs(grey - before).mean()))
        before = grey
    differences = np.array(changes)
    starts = []
    for i in np.flatnonzero(differences >= threshold):
        near = differences[max(0, i - NUM_AROUND) : i + NUM_AROUND + 1]
        if differences[i] >= 3 * np.median(near) and differences[i] == near.max():
            starts.append(kept[i])
    return starts
