"""Which temporal cells of a medium each rank of a team decodes and encodes (MR-SP stage 1, arXiv:2507.07966).

A cell is what the vision tower cannot split: two frames for Qwen. Shares are neighbouring cells, as equal as they can
be, and follow from the medium alone, so that every rank knows every share without asking.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FramesPerCell:
    """Frames of a temporal cell where they follow from the length of the video.

    Example:
        `FramesPerCell(4, (256, 512)).of(300)` is 8.
    """

    fewest: int = 1
    doubled_beyond: tuple[int, ...] = ()
    """Lengths in frames; a video longer than one of them has twice as many frames in a cell."""

    def of(self, num_frames: int) -> int:
        """The frames of a cell of a video of so many."""
        return self.fewest << sum(num_frames > limit for limit in self.doubled_beyond)


@dataclass(frozen=True)
class Share:
    """One of `size` shares.

    Example:
        `Share(1, 2).cells(5)` is `range(2, 5)`.
    """

    rank: int = 0
    size: int = 1

    def cells(self, num_cells: int) -> range:
        """This share's cells of a medium; the one cell of an image is the last rank's."""
        return range(num_cells * self.rank // self.size, num_cells * (self.rank + 1) // self.size)

    def frames(self, num_frames: int, frames_per_cell: int | FramesPerCell) -> range:
        """The frames of `cells`; the last cell may lack some."""
        of_a_cell = frames_per_cell if isinstance(frames_per_cell, int) else frames_per_cell.of(num_frames)
        cells = self.cells(-(-num_frames // of_a_cell))
        return range(min(cells.start * of_a_cell, num_frames), min(cells.stop * of_a_cell, num_frames))


WHOLE = Share()
"""One rank has all."""
NONE = Share(0, 1 << 62)
"""No frame of any medium: enough for its size and times."""
