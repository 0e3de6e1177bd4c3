"""Which frames of a generated video a reward sees."""

from __future__ import annotations

import re

EVERY = re.compile(r"every ([1-9]\d*)")


def frame_indices(num_frames: int, frames_of: str) -> list[int]:
    """Indices of the frames of a generated video that a reward sees, the same ones whenever it looks.

    Args:
        num_frames: F of the video; a picture has one.
        frames_of: `all`, `first`, `last`, or `every N`: frames 0, N, 2N and so on.

    Raises:
        ValueError: another choice.

    Example:
        `frame_indices(10, "every 4")` is `[0, 4, 8]`.
    """
    if frames_of in ("first", "last"):
        return [0 if frames_of == "first" else num_frames - 1]
    every = EVERY.fullmatch(frames_of)
    if not every and frames_of != "all":
        raise ValueError(f"frames_of of a reward must be all, first, last or 'every N' with N >= 1, got {frames_of!r}")
    return list(range(0, num_frames, int(every[1]) if every else 1))
