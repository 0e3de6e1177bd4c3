"""Learning curves of several runs in the same charts: a chart for each metric, a colour for each run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from longrl.evaluation.curves import (
    COLORS,
    MAX_COLUMNS,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    PANELS,
    SMOOTH_FROM,
    Metrics,
    decorate,
    matching_columns,
    short_name,
    smoothed,
)
from longrl.evaluation.run_records import phase_sums

DASHES = ("-", "--", ":", "-.")
"""Of the runs that begin with the first colour again."""


def plot_overlaid(runs: Mapping[str, Metrics]) -> Figure | None:
    """Small charts of metrics that any of the runs has; None where none has any.

    Args:
        runs: name -> column -> step -> value. Steps and columns may differ.
    """
    charts = overlaid_charts(runs)
    if not charts:
        return None
    num_columns = 2 if len(charts) == 4 else min(MAX_COLUMNS, len(charts))
    num_rows = math.ceil(len(charts) / num_columns)
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    size = (PANEL_WIDTH * num_columns, PANEL_HEIGHT * num_rows + 0.3)
    figure = Figure(figsize=size, dpi=130, layout=layout)
    looks = dict(zip(runs, itertools.product(DASHES, COLORS), strict=False))
    labelled: dict[str, Line2D] = {}
    for number, (title, (unit, lines)) in enumerate(charts.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        for name, points in lines.items():
            dash, color = looks.get(name, (DASHES[0], COLORS[0]))
            labelled.setdefault(name, _draw_line(axes, points, color, dash, is_smooth=title != "Learning rate"))
        decorate(axes, title, unit)
        if number > len(charts) - num_columns:
            axes.set_xlabel("step", fontsize=8, color="#5b6773")
    names = [name for name in runs if name in labelled]
    handles = [labelled[name] for name in names]
    figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), fontsize=8.5, frameon=False)
    return figure


def overlaid_charts(runs: Mapping[str, Metrics]) -> dict[str, tuple[str, dict[str, Mapping[int, float]]]]:
    """Title -> unit, and the points of each run that has the metric; phase times are added up."""
    charts: dict[str, tuple[str, dict[str, Mapping[int, float]]]] = {}
    for panel in PANELS:
        by_run = {name: matching_columns(metrics, panel) for name, metrics in runs.items()}
        columns = list(dict.fromkeys(column for names in by_run.values() for column in names))
        if panel.kind == "stacked":
            sums: dict[str, Mapping[int, float]]
            sums = {name: phase_sums(runs[name], found) for name, found in by_run.items() if found}
            if sums:
                charts[panel.title] = (panel.unit, sums)
            continue
        for column in columns:
            title = panel.title if len(columns) == 1 else f"{panel.title}: {short_name(column, columns)}"
            lines = {name: runs[name][column] for name, found in by_run.items() if column in found}
            charts[title] = (panel.unit, lines)
    return charts


def _draw_line(axes: Axes, points: Mapping[int, float], color: str, dash: str, *, is_smooth: bool) -> Line2D:
    steps: Sequence[int] = list(points)
    values = list(points.values())
    if is_smooth and len(values) >= SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.22)
        values = smoothed(values)
    marker = "o" if len(values) < 12 else None
    (line,) = axes.plot(steps, values, dash, color=color, linewidth=1.7, marker=marker, markersize=3)
    return line
