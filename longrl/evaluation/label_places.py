"""Places for the labels of points in a chart: near their points, and over nothing else where there is room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""
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
    taken = [_around(_moved(to_pixels((label.x, label.y)), label.shift * unit), MARKER * unit) for label in labels]
    for bar in bars:
        x, bottom = _moved(to_pixels((bar.x, bar.low)), bar.shift * unit)
        _, top = to_pixels((bar.x, bar.high))
        taken.append((x - 2 * unit, bottom, x + 2 * unit, float(top)))
    taken += [box for line in axes.get_lines() if len(_corners(line)) < MAX_LINE for box in _along(line)]
    area = axes.get_window_extent()
    inside = (area.x0, area.y0, area.x1, area.y1)
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=label.size, color=label.color,
            ha="center", va="center", zorder=5,
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent()
        point = _moved(to_pixels((label.x, label.y)), label.shift * unit)
        boxes = [
            _beside(point, (extent.width, extent.height), (right, up), distance * unit)
            for distance in DISTANCES
            for right, up in DIRECTIONS
        ]
        others = np.array(taken)
        best = min(boxes, key=lambda box: _hidden(box, others, inside))
        taken.append(best)
        x, y = to_pixels((label.x, label.y))
        text.xyann = (((best[0] + best[2]) / 2 - x) / unit, ((best[1] + best[3]) / 2 - y) / unit)


def _moved(point: np.ndarray, across: float) -> tuple[float, float]:
    return float(point[0]) + across, float(point[1])


def _around(point: tuple[float, float], half: float) -> Box:
    return point[0] - half, point[1] - half, point[0] + half, point[1] + half


def _corners(line: Line2D) -> np.ndarray:
    """[n, 2] in pixels."""
    return line.get_transform().transform(np.asarray(line.get_xydata()))


def _along(line: Line2D) -> Iterator[Box]:
    """Small boxes along a line."""
    for start, end in itertools.pairwise(_corners(line)):
        for share in np.linspace(0.0, 1.0, STEPS):
            x, y = start + share * (end - start)
            yield _around((float(x), float(y)), 1.0)


def _beside(point: tuple[float, float], size: tuple[float, float], direction: tuple[int, int], distance: float) -> Box:
    """The box of a label that begins so far from its point."""
    (width, height), (right, up) = size, direction
    left = point[0] + distance * right - (width if right < 0 else width / 2 if right == 0 else 0)
    bottom = point[1] + distance * up - (height if up < 0 else height / 2 if up == 0 else 0)
    return left, bottom, left + width, bottom + height


def _hidden(box: Box, others: np.ndarray, inside: Box) -> float:
    """Pixels of other things below a box, and ten times its own outside of the chart.

    Args:
        box: of a label.
        others: [n, 4] boxes.
        inside: the chart's.
    """
    overlap = _shared(box, others).sum()
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(overlap + 10 * (area - _shared(box, np.array([inside])).sum()))


def _shared(box: Box, others: np.ndarray) -> np.ndarray:
    """[n] pixels that a box shares with each of the others."""
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return np.clip(width, 0, None) * np.clip(height, 0, None)
