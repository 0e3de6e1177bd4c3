"""What a curriculum notes on the rows that it draws: which row it is, and which frames of its video are read.

The mark is in the row's metadata, so it goes wherever the row does: to a loader worker, with a group whose rewards say
how often the row was answered right, and into a checkpoint, from which the prompt is rendered again as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import Row

MARK = "curriculum_draw"
Budget = tuple[tuple[str, float], ...]
"""Options of `VideoSampling` and their values, in place of those of `data.video`."""


@dataclass(frozen=True)
class RowDraw:
    """A row to be rendered."""

    index: int
    """In the data set."""
    video: Budget = ()


def marked(row: Row, draw: RowDraw) -> Row:
    """The row with the mark of its draw."""
    mark = {"row": draw.index, "video": dict(draw.video)}
    return replace(row, metadata={**row.metadata, MARK: mark})


def unmarked(row: Row) -> Row:
    """The row as the data set has it."""
    return replace(row, metadata={name: value for name, value in row.metadata.items() if name != MARK})


def drawn_index(row: Row) -> int | None:
    """Index of a marked row in the data set; None of another."""
    mark: Mapping[str, Any] | None = row.metadata.get(MARK)
    return None if mark is None else int(mark["row"])


def video_of(row: Row, video: VideoSampling) -> VideoSampling:
    """Which frames of its videos are read: what `data.video` says, but for what its draw says."""
    mark: Mapping[str, Any] | None = row.metadata.get(MARK)
    return replace(video, **mark["video"]) if mark else video
