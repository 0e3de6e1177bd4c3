"""Selections by the question: the frames most similar to it by a local CLIP or SigLIP, alone or spread over the video.

Letters: C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from longrl.datamodules.selection.candidates import Candidates
from longrl.datamodules.selection.frame_selection import FrameSelection
from longrl.datamodules.selection.image_text_model import check_folder, model_digest, similarities
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, SHARE, check_ranges

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Similarity(FrameSelection):
    """The candidates whose pictures are most similar to the question.

    Example:
        `Similarity(folder="models/siglip-base-patch16-224", candidates_fps=1.0)`
    """

    folder: str = ""
    """Of a CLIP or SigLIP as `save_pretrained` or a hub download leaves it: safetensors weights and the processor's
    files. Nothing is downloaded. It runs on the CPU of whoever renders."""
    batch_size: int = 32
    """Pictures embedded together."""
    cache_dir: str | None = None
    """Where embeddings of candidates are kept for other processes and runs; None keeps them in memory alone."""
    min_gap_s: float = 0.0
    """Candidates nearer than that to a more similar one come after all others."""

    reads_question: ClassVar[bool] = True
    not_in_identity: ClassVar[tuple[str, ...]] = ("folder", "cache_dir")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.selection.init_args.", batch_size=COUNT, min_gap_s=NOT_NEGATIVE)

    @override
    def check(self) -> None:
        check_folder(self.folder)

    @override
    def identity(self) -> dict[str, object]:
        return {**super().identity(), "model": model_digest(self.folder)}

    @override
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        scores = self.scores(video, question)
        return video.times[self.best(scores, video.times, count)].tolist()

    def scores(self, video: Candidates, question: str) -> Scores:
        """[C] cosine similarity of each candidate and the question."""
        return similarities(video, question, self.folder, self.batch_size, self.cache_dir)

    def best(self, scores: Scores, times: NDArray[np.float64], count: int) -> list[int]:
        """Indices of the chosen candidates."""
        return top_indices(scores, times, count, self.min_gap_s)


@dataclass(frozen=True)
class Coverage(Similarity):
    """Similarity and coverage, as AKS (arXiv:2502.21271, sec. 3.3): a part that has a clear best is not cut further.

    Scores are scaled to 0 to 1. Where the mean of a part's best exceeds its mean by `threshold`, its frames are its
    best; else it is cut into halves, which share its frames, down to `max_depth` cuts.
    """

    threshold: float = 0.8
    """That of the released code."""
    max_depth: int = 5
    """0 is never cut, which is `Similarity`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.selection.init_args.", threshold=SHARE, max_depth=(0, 30))

    @override
    def best(self, scores: Scores, times: NDArray[np.float64], count: int) -> list[int]:
        return covering_indices(scores, count, self.threshold, self.max_depth)


def by_score(scores: Scores) -> NDArray[np.int64]:
    """Indices from the highest score down; of equal ones the earlier first."""
    return np.argsort(-scores, kind="stable")


def top_indices(scores: Scores, times: NDArray[np.float64], count: int, min_gap_s: float = 0.0) -> list[int]:
    """Indices of the highest scores, in the order of time.

    Args:
        scores: [C].
        times: [C] seconds.
        count: at most C.
        min_gap_s: those nearer to one with a higher score come last.
    """
    chosen: list[int] = []
    near: list[int] = []
    for index in by_score(scores).tolist():
        is_near = min_gap_s > 0 and bool(chosen) and float(np.abs(times[chosen] - times[index]).min()) < min_gap_s
        (near if is_near else chosen).append(index)
        if len(chosen) == count:
            break
    return sorted([*chosen, *near][:count])


def covering_indices(scores: Scores, count: int, threshold: float, max_depth: int) -> list[int]:
    """Indices of `Coverage`, exactly `count`, in the order of time.

    Where the halves of `count` are whole numbers down to the last cut, these are those of the released code; it leaves
    frames out elsewhere, here the second half has one more, and what a short part cannot give goes to the best others.

    Args:
        scores: [C].
        count: at most C.
        threshold: see `Coverage`.
        max_depth: see `Coverage`.
    """
    spread = float(scores.max() - scores.min())
    scaled = (scores - scores.min()) / spread if spread else np.zeros_like(scores)
    chosen: list[int] = []
    parts = [(0, len(scores), count, 0)]
    while parts:
        start, stop, share, depth = parts.pop()
        part = scaled[start:stop]
        order = by_score(part)
        # The best are as many as the whole video shows, whatever the part's share.
        if share < 2 or depth == max_depth or part[order[:count]].mean() - part.mean() > threshold:
            chosen += (start + order[:share]).tolist()
            continue
        middle = start + len(part) // 2
        parts += [(start, middle, share // 2, depth + 1), (middle, stop, share - share // 2, depth + 1)]
    missing = [index for index in by_score(scaled).tolist() if index not in set(chosen)]
    return sorted([*chosen, *missing[: count - len(chosen)]])
