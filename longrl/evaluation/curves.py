"""Learning curves from the metrics.csv files of a run (longrl/callbacks/csv_log.py), or of Lightning's CSVLogger."""

from __future__ import annotations

import contextlib
import csv
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread
from matplotlib.layout_engine import ConstrainedLayoutEngine

Metrics = Mapping[str, Mapping[int, float]]
"""Column -> step -> value."""

SMOOTH_FROM = 30
"""Curves of so many points or more are drawn faint, with their moving average on top."""


@dataclass(frozen=True)
class Panel:
    """One small chart: the columns it shows and how."""

    title: str
    columns: str
    """Regular expression searched in each column name."""
    unit: str = ""
    kind: Literal["noisy", "exact", "stacked"] = "noisy"
    """Long noisy curves are smoothed; stacked columns add up to something, like phase times to the step time."""


COLORS = ("#2f6db3", "#e07a3f", "#3a9d7c", "#9466b8", "#c4527a", "#8a8f98", "#c9a227")
PANEL_WIDTH, PANEL_HEIGHT = 4.1, 2.6
"""Inches."""
MAX_COLUMNS = 3


PANELS: tuple[Panel, ...] = (
    Panel("Reward", r"^(train/|val/)?rewards?(/mean|_mean|/total)?$"),
    Panel("Accuracy", r"(^|/)accuracy(/mean|_mean|/overall|_lenient)?$"),
    Panel("Format", r"(^|/)(format|think_answer_format|format_rate)(/mean|_mean)?$"),
    Panel("Parts of the reward", r"^reward/(?!(mean|std_in_group|accuracy|format|think_answer_format)$)\w+$"),
    Panel("Loss", r"(^|/)loss(/mean|_mean)?$"),
    Panel("Cut off", r"(^|/)cut_off$", unit="share of completions"),
    Panel("Entropy", r"(^|/)entropy(/mean|_mean)?$", unit="nats"),
    Panel("KL to the reference", r"(^|/)(ref_)?kl(_ref)?(/mean|_mean)?$", unit="nats"),
    Panel("Completion length", r"(^|/)(completion|response)_(tokens|length)(/mean|_mean)?$", unit="tokens"),
    Panel("Calls and turns", r"(^|/)rollout/(tool_calls|turns)$", unit="per completion"),
    Panel("Tokens shown by tools", r"(^|/)observed_tokens$", unit="tokens"),
    Panel("Mismatch of engine and trainer", r"(^|/)mismatch_mean$", unit="nats"),
    Panel("Staleness", r"(^|/)staleness_(mean|max)$", unit="rollouts"),
    Panel("Tokens by staleness", r"(^|/)staleness_share_\d+$", "share", "stacked"),
    Panel("Mismatch by staleness", r"(^|/)mismatch_mean_staleness_\d+$", unit="nats"),
    Panel("Queues", r"(^|/)(groups_ready|prompts_in_flight)$", unit="prompts"),
    Panel("Asked again and dropped", r"(^|/)rollout/(asked_again|dropped)$", unit="prompts"),
    Panel("Trainer and engine busy", r"(^|/)(trainer_busy|engine_busy)$", unit="share"),
    Panel("Groups without signal", r"(^|/)groups_without_signal$", unit="share of groups"),
    Panel("Pass rate of the rows", r"^data/pass_rate_mean$"),
    Panel("Rows in the band", r"^data/rows_(in_band|known|new)$", unit="rows"),
    Panel("Shares of the sources", r"^data/weight_\w+$", "share", "stacked"),
    Panel("Frames by schedule", r"^data/(max_frames|num_frames)$", "frames", "exact"),
    Panel("Longest completion by schedule", r"^data/max_completion_tokens$", "tokens", "exact"),
    Panel("Gradient norm", r"(^|/)grad(ient)?_norm$"),
    Panel("Learning rate", r"(^|/)(lr|learning_rate)\b|^lr-", kind="exact"),
    Panel(
        "Time per step",
        r"(^|/)(time|times|phase|phases|seconds)/(?!step|total)\w+$|(^|/)(encode|generate|reward|update)_s$",
        "s",
        "stacked",
    ),
)
"""Panels of the report, in order; one without a column in the file is left out."""


MAX_STEP = 1e12
"""No run has so many; charts cannot have more."""


def find_metrics(folder: str | Path) -> list[Path]:
    """Finds all metrics.csv of a run's training, or below any other folder, version_1 before version_10."""
    logs = Path(folder, "logs")
    paths = [path for path in (logs if logs.is_dir() else Path(folder)).rglob("metrics.csv") if path.is_file()]
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda number: number[0].zfill(9), str(path)))


def read_metrics(paths: str | Path | Iterable[str | Path]) -> dict[str, dict[int, float]]:
    """Reads one or several metrics.csv of one run and merges them by step.

    Cells that are empty or not finite numbers are left out; where several files or rows have a value for one step,
    the later one wins, so that a resumed run replaces what it repeated.

    Args:
        paths: files in the order of their versions.

    Returns:
        Column -> step -> value, steps ascending.
    """
    merged: dict[str, dict[int, float]] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
            for row in _rows(file):
                step = _number(row.get("step"))
                if step is None or abs(step) > MAX_STEP:
                    continue
                for column, cell in row.items():
                    value = _number(cell)
                    if (
                        step is not None
                        and abs(step) < MAX_STEP
                        and value is not None
                        and column not in (None, "step", "epoch")
                    ):
                        merged.setdefault(column, {})[int(step)] = value
    return {column: dict(sorted(values.items())) for column, values in merged.items()}


def _rows(file: TextIO) -> Iterator[dict[str | Any, str | Any]]:
    """Lines of a table until one that is none, as a machine leaves it that loses its power."""
    with contextlib.suppress(csv.Error):
        yield from csv.DictReader(file)


def _number(cell: object) -> float | None:
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def plot_curves(metrics: Metrics) -> Figure | None:
    """Small charts of a run's metrics, one for each of `PANELS` that has data.

    Returns:
        A figure to save with `figure.savefig(path)`; None when no panel has data.
    """
    shown = [(panel, columns) for panel in PANELS if (columns := matching_columns(metrics, panel))]
    if not shown:
        return None
    num_columns = 2 if len(shown) == 4 else min(MAX_COLUMNS, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    figure = Figure(figsize=(PANEL_WIDTH * num_columns, PANEL_HEIGHT * num_rows), dpi=130, layout=layout)
    for number, (panel, columns) in enumerate(shown, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        _draw_panel(axes, panel, {column: metrics[column] for column in columns})
        if number > len(shown) - num_columns:
            axes.set_xlabel("step", fontsize=8, color="#5b6773")
    return figure


def matching_columns(metrics: Metrics, panel: Panel) -> list[str]:
    """Columns that a panel shows; of a metric logged per step and per epoch, only the former."""
    names = [
        name for name in metrics if metrics[name] and re.search(panel.columns, re.sub(r"_(step|epoch)$", "", name))
    ]
    return sorted(name for name in names if not (name.endswith("_epoch") and f"{name[:-6]}_step" in names))


def _draw_panel(axes: Axes, panel: Panel, series: Metrics) -> None:
    labels = [short_name(name, series) for name in series]
    colors = [COLORS[number % len(COLORS)] for number in range(len(series))]
    if panel.kind == "stacked":
        steps = sorted({step for points in series.values() for step in points})
        heights = [[points.get(step, 0.0) for step in steps] for points in series.values()]
        if len(steps) >= SMOOTH_FROM:
            heights = [smoothed(values) for values in heights]
        axes.stackplot(steps, heights, labels=labels, colors=colors, alpha=0.85, linewidth=0)
        axes.set_ylim(0, 1.3 * max(map(sum, zip(*heights, strict=True))) or 1.0)  # room for the legend
    else:
        for points, label, color in zip(series.values(), labels, colors, strict=True):
            steps, values = list(points), list(points.values())
            marker = "o" if len(values) < 12 else None
            if panel.kind == "noisy" and len(values) >= SMOOTH_FROM:
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
                axes.plot(steps, smoothed(values), color=color, linewidth=1.8, label=label)
            else:
                axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)
    decorate(axes, panel.title, panel.unit)
    if len(series) > 1:
        legend = axes.legend(fontsize=7, frameon=False, ncols=1 + (len(series) > 3))
        for text in legend.get_texts():
            text.set_color("#46525e")


def decorate(axes: Axes, title: str, unit: str = "") -> None:
    """The look that all charts share."""
    axes.set_title(f"{title} ({unit})" if unit else title, fontsize=9.5, loc="left", color="#22303c")
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors="#5b6773", length=0)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8c1ca")


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred Gaussian average, so that a slope is not shifted; its width is a fortieth of the curve, at least 2."""
    width = max(2.0, len(values) / 40)
    reach = min(round(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weights = np.convolve(np.ones(len(values)), kernel, mode="same")  # less at both ends
    return (np.convolve(values, kernel, mode="same") / weights).tolist()


def short_name(column: str, among: Iterable[str]) -> str:
    """The column without what all of them share: "train/time/encode_s" among its like is "encode"."""
    shared = posixpath.commonpath([posixpath.dirname(name) for name in among])
    return re.sub(r"_(step|epoch|s)$", "", column.removeprefix(shared).removeprefix("/"))
