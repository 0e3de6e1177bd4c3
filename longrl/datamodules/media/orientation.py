"""How the frames of a video stand: quarter turns and mirrorings, as a container's display matrix asks for them."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_OFF_DEGREES = 1.0
"""A matrix so near to a right angle is meant as one: FFmpeg's players do not turn by less either."""


class Orientation(NamedTuple):
    """What makes stored frames upright, in this order.

    Example:
        `Orientation(transposed=True, mirrored_x=True)` is a quarter turn clockwise.
    """

    transposed: bool = False
    """Rows become columns: height and width change places."""
    mirrored_x: bool = False
    """Left becomes right."""
    mirrored_y: bool = False
    """Top becomes bottom."""

    @property
    def is_mirrored(self) -> bool:
        """True for what no turning makes upright."""
        return sum(self) % 2 == 1

    def turn(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A stored frame [H, W, 3] as it is to be seen; a view."""
        if self.transposed:
            pixels = pixels.transpose(1, 0, 2)
        if self.mirrored_x:
            pixels = pixels[:, ::-1]
        return pixels[::-1] if self.mirrored_y else pixels

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a stored frame as it is to be seen."""
        return (width, height) if self.transposed else (height, width)


UPRIGHT = Orientation()


def is_exact(display_matrix: bytes) -> bool:
    """True if a display matrix turns by right angles to the last digit; `orientation_of` takes it for one if nearly."""
    a, b, _, c, d, *_ = struct.unpack("=9i", display_matrix)
    return a == d == 0 or b == c == 0


def orientation_of(display_matrix: bytes) -> Orientation:
    """What a display matrix (ISO 14496-12, 6.2.2) asks for: a point (x, y) is shown at (a x + c y, b x + d y).

    Phones write one instead of turning pixels. FFmpeg's own players and OpenCV obey it.

    Args:
        display_matrix: nine 32-bit numbers, a, b, u, c, d, v, x, y, w, as FFmpeg hands them on.

    Raises:
        ValueError: it turns by other than right angles.

    Example:
        a, b, c, d of 0, 1, -1, 0 are a quarter turn clockwise.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", display_matrix)
    degrees = math.degrees(math.atan2(b, a))
    off = abs((degrees + 45) % 90 - 45)
    if off > MAX_OFF_DEGREES:
        raise ValueError(f"its picture is to be turned by {degrees:.0f} degrees, which is no right angle")
    if abs(a) >= abs(b):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)
