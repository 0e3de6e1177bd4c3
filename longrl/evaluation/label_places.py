"""Places for the labels of points in a chart: near their points, and over nothing else where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

DISTANCES = (8, 14, 22, 32)
"""Points from a label's point."""
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
"""Right first, for a reader goes on there."""
MARKER = 5.0
"""Half the size of a marker, with room around it."""


@dataclass(frozen=True)
class Label:
    """A text beside a point."""

    text: str
    x: float
    y: float
    color: str
    size: float = 7.5


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], spans: Sequence[tuple[float, float, float]] = ()
) -> None:
    """Writes labels where they hide least: each other, markers and vertical bars.

    Args:
        figure: its layout is done here, so all else is in it already.
        axes: of the points, in whose data the labels lie.
        labels: in the order in which they choose their places.
        spans: vertical bars (x, low, high).
    """
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    unit = figure.dpi / 72
    taken = []
    for label in labels:
        x, y = to_pixels((label.x, label.y))
        taken.append(Bbox.from_extents(x - MARKER * unit, y - MARKER * unit, x + MARKER * unit, y + MARKER * unit))
    for at, low, high in spans:
        (x, bottom), (_, top) = to_pixels((at, low)), to_pixels((at, high))
        taken.append(Bbox.from_extents(x - 2 * unit, bottom, x + 2 * unit, top))
    inside = axes.get_window_extent()
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", fontsize=label.size, color=label.color,
            ha="center", va="center", zorder=5,
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent()
        point = to_pixels((label.x, label.y))
        best = min(
            ((distance * right, distance * up, right, up) for distance in DISTANCES for right, up in DIRECTIONS),
            key=lambda place: _hidden(_box(point, size, place, unit), taken, inside),
        )
        box = _box(point, size, best, unit)
        taken.append(box)
        text.xyann = ((box.x0 + box.width / 2 - point[0]) / unit, (box.y0 + box.height / 2 - point[1]) / unit)


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
