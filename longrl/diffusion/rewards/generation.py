"""Rewards for generated pictures and videos that need no model: how many bytes, how steady, how much motion.

Every function takes frames [F, 3, H, W] uint8 RGB (F = 1 for a picture) and the row of the prompt. Colours and layout
are in colour.py, text in ocr.py, alignment with the prompt and aesthetics in clip.py, quality in quality.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from longrl.types import Row

JPEG_QUALITY = 95
"""As in DDPO."""


def jpeg_kilobytes(frame: Tensor) -> float:
    """Size of a frame [3, H, W] uint8 as a JPEG file of quality 95, in units of 1000 bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame.movedim(0, -1).contiguous().cpu().numpy()).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return len(buffer.getvalue()) / 1000


def incompressibility(frames: Tensor, row: Row) -> float:
    """Size as JPEG in kilobytes, mean over frames (DDPO, arXiv:2305.13301, sec. 5.1): detail and noise."""
    return sum(map(jpeg_kilobytes, frames)) / len(frames)


def compressibility(frames: Tensor, row: Row) -> float:
    """Minus the size as JPEG in kilobytes, mean over frames (DDPO, arXiv:2305.13301, sec. 5.1): plain pictures."""
    return -incompressibility(frames, row)


def temporal_smoothness(frames: Tensor, row: Row) -> float:
    """1 - mean |x[t-1] - 2 x[t] + x[t+1]| / 510, in [0, 1] for pixels x from 0 to 255.

    1 for a video that stands still or changes at a constant rate, 0 for one that flips between black and white. It sees
    flicker and jumps, but moving edges too: no flow is estimated. Alone it is best met by a still picture, so it
    belongs beside `MotionAmount`.

    Raises:
        ValueError: fewer than three frames.
    """
    _check_num_frames(3, frames, "temporal_smoothness")
    # In 16 bits differences of differences fit, and a long video takes no more than it must.
    return 1 - _mean_absolute(frames.short().diff(n=2, dim=0)) / 510


def mean_motion(frames: Tensor) -> float:
    """Mean |x[t+1] - x[t]| / 255 of frames [F, 3, H, W] uint8, in [0, 1].

    Raises:
        ValueError: fewer than two frames.
    """
    _check_num_frames(2, frames, "motion")
    return _mean_absolute(frames.short().diff(dim=0)) / 255


@dataclass(frozen=True)
class MotionAmount:
    """Motion up to an amount that is enough: min(mean |x[t+1] - x[t]| / 255, enough) / enough, in [0, 1].

    Example:
        `MotionAmount(enough=0.02)`: a video whose pixels change by 5 of 255 from frame to frame gets almost 1.
    """

    enough: float = 0.02
    """More motion than this earns nothing, so that flicker does not pay."""

    def __post_init__(self) -> None:
        if not 0 < self.enough <= 1:
            raise ValueError(f"enough of MotionAmount must lie in (0, 1], got {self.enough}")

    def __call__(self, frames: Tensor, row: Row) -> float:
        """The reward of one video, frames [F, 3, H, W] uint8."""
        return min(mean_motion(frames), self.enough) / self.enough


def _mean_absolute(values: Tensor) -> float:
    """Mean absolute value of integers, exactly summed."""
    return int(values.abs().sum()) / values.numel()


def _check_num_frames(count: int, frames: Tensor, name: str) -> None:
    if len(frames) < count:
        raise ValueError(
            f"{name} needs at least {count} frames, got {len(frames)}; use it for videos, with a frames_of that leaves "
            "enough of them"
        )
