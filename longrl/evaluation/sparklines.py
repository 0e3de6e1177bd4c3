"""Curves of a run that goes on: few numbers whatever its length, and as one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Eight heights of a character cell."""
ASCII_BLOCKS = "_.-=+*%#"
"""The same for terminals that know no others."""
MAX_POINTS = 240
"""Points of a curve; twice as many characters are never shown."""


class Curve:
    """A metric from the start of the run to now, thinned by halves: each point is the mean of `stride` values."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.stride = 1
        self.first = math.nan
        self.last = math.nan
        self._begun: list[float] = []
        """Values of the next point."""

    def add(self, value: float) -> None:
        """Takes in the next value; one that is no finite number is left out."""
        if not math.isfinite(value):
            return
        if not self.points and not self._begun:
            self.first = value
        self.last = value
        self._begun.append(value)
        if len(self._begun) < self.stride:
            return
        self.points.append(math.fsum(self._begun) / self.stride)
        self._begun = []
        if len(self.points) == MAX_POINTS:
            self.stride *= 2
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(one + other) / 2 for one, other in pairs]

    def values(self) -> list[float]:
        """The points, and the mean of what is no full one yet."""
        begun = [math.fsum(self._begun) / len(self._begun)] if self._begun else []
        return [*self.points, *begun]

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"points": self.points, "stride": self.stride, "begun": self._begun, "ends": [self.first, self.last]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.points, self.stride = list(state["points"]), state["stride"]
        self._begun = list(state["begun"])
        self.first, self.last = state["ends"]


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """A curve in at most `width` characters, from its least value at the bottom to its largest at the top."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [math.fsum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if not high > low:
        return blocks[0] * count
    # Halves first: the difference of two huge numbers is no finite one.
    heights = [(mean / 2 - low / 2) / (high / 2 - low / 2) for mean in means]
    return "".join(blocks[min(int(height * len(blocks)), len(blocks) - 1)] for height in heights)
