"""Places for the labels of points in a chart: near their points, and over nothing else where there is room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

DISTANCES = (8, 14, 22, 32)
"""Points from a label's point."""
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
"""Right first, for a reader goes on there."""
STEPS = 120
"""Boxes along a part of a line."""
MAX_LINE = 50
"""Corners of a line that labels heed."""
MARKER = 5.0
"""Half the size of a marker, with room around it."""


@dataclass(frozen=True)
class Label:
    """A text beside a point."""

    text: str
    x: float
    y: float
    color: str
    shift: float = 0.0
    """Points by which the point itself is drawn to the right of x."""
    size: float = 7.5


@dataclass(frozen=True)
class Bar:
    """A vertical line that labels should not hide."""

    x: float
    low: float
    high: float
    shift: float = 0.0


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label], bars: Sequence[Bar] = ()) -> None:
    """Writes labels where they hide least: each other, markers and vertical bars.

    Args:
        figure: its layout is done here, so all else is in it already.
        axes: of the points, in whose data the labels lie.
        labels: in the order in which they choose their places.
        bars: intervals.
    """
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    unit = figure.dpi / 72
    taken = []
    for label in labels:
        x, y = _moved(to_pixels((label.x, label.y)), label.shift * unit)
        taken.append(Bbox.from_extents(x - MARKER * unit, y - MARKER * unit, x + MARKER * unit, y + MARKER * unit))
    for bar in bars:
        x, bottom = _moved(to_pixels((bar.x, bar.low)), bar.shift * unit)
        _, top = to_pixels((bar.x, bar.high))
        taken.append(Bbox.from_extents(x - 2 * unit, bottom, x + 2 * unit, top))
    taken += [box for line in axes.get_lines() if len(line.get_xydata()) < MAX_LINE for box in _along(line)]
    inside = axes.get_window_extent()
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=label.size, color=label.color,
            ha="center", va="center", zorder=5,
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent()
        point = _moved(to_pixels((label.x, label.y)), label.shift * unit)
        best = min(
            ((distance * right, distance * up, right, up) for distance in DISTANCES for right, up in DIRECTIONS),
            key=lambda place: _hidden(_box(point, size, place, unit), taken, inside),
        )
        box = _box(point, size, best, unit)
        taken.append(box)
        x, y = to_pixels((label.x, label.y))
        text.xyann = ((box.x0 + box.width / 2 - x) / unit, (box.y0 + box.height / 2 - y) / unit)


def _moved(point: Sequence[float], across: float) -> tuple[float, float]:
    return point[0] + across, point[1]


def _along(line: Line2D) -> Iterator[Bbox]:
    """Small boxes along a line, in pixels."""
    corners = line.get_transform().transform(line.get_xydata())
    for start, end in itertools.pairwise(corners):
        for share in np.linspace(0.0, 1.0, STEPS):
            x, y = start + share * (end - start)
            yield Bbox.from_extents(x - 1, y - 1, x + 1, y + 1)


def _box(point: Sequence[float], size: Bbox, place: tuple[float, float, float, float], unit: float) -> Bbox:
    """The label's box if it begins at this distance from its point."""
    across, up, right, above = place
    left = point[0] + across * unit - (size.width if right < 0 else size.width / 2 if right == 0 else 0)
    bottom = point[1] + up * unit - (size.height if above < 0 else size.height / 2 if above == 0 else 0)
    return Bbox.from_bounds(left, bottom, size.width, size.height)


def _hidden(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Pixels of other things below a box, and ten times those outside of the chart; the first place with least wins."""
    overlap = sum(shared.width * shared.height for other in taken if (shared := Bbox.intersection(box, other)))
    within = Bbox.intersection(box, inside)
    outside = box.width * box.height - (within.width * within.height if within else 0.0)
    return overlap + 10 * outside
