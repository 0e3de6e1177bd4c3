"""What a curriculum notes on the rows that it draws: which row it is, and which frames of its video are read.

The mark is a field of the row, `Row.draw`, so it goes wherever the row does: to a loader worker, with a group whose
rewards say how often the row was answered right, and into a checkpoint, from which the prompt is rendered again as it
was. It is not in the metadata, which rewards, scorers and environments of others are handed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import Row

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
    return replace(row, draw={"row": draw.index, "video": dict(draw.video)})


def unmarked(row: Row) -> Row:
    """The row as the data set has it."""
    return replace(row, draw=None)


def drawn_index(row: Row) -> int | None:
    """Index of a marked row in the data set; None of another."""
    return None if row.draw is None else int(row.draw["row"])


def video_of(row: Row, video: VideoSampling) -> VideoSampling:
    """Which frames of its videos are read: what `data.video` says, but for what its draw says."""
    return video if row.draw is None else replace(video, **row.draw["video"])
