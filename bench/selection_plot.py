"""Found events against what they cost, a curve for each selection: the plot of bench/selection.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longrl.evaluation.charts import run_color
from longrl.evaluation.curves import decorate

COSTS = {"frames": "frames of a question", "tokens": "tokens of its media"}
mpl.rcParams["svg.hashsalt"] = "selection"  # the same rows give the same file


def plot_found(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Share of found events with 95% intervals against frames and against tokens, on scales of powers of two.

    Args:
        rows: of the bench.
        title: of all.
    """
    figure = Figure(figsize=(10.5, 4.2), dpi=110, layout="constrained")
    for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        draw_curves(axes, rows, cost)
        decorate(axes, f"Events found ({title})" if cost == "frames" else "the same against tokens", "%")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.minorticks_off()
        axes.set_xlabel(label, fontsize=8, color="#5b6773")
        axes.margins(x=0.04)
        axes.set_ylim(0, 104)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def draw_curves(axes: Axes, rows: Sequence[Mapping[str, Any]], cost: str) -> None:
    """A curve for each selection."""
    for position, name in enumerate(dict.fromkeys(row["selection"] for row in rows)):
        points = [row for row in rows if row["selection"] == name]
        shares = [100 * row["found"] for row in points]
        below = [max(0.0, 100 * (row["found"] - row["low"])) for row in points]
        above = [max(0.0, 100 * (row["high"] - row["found"])) for row in points]
        axes.errorbar(
            [row[cost] for row in points], shares, [below, above], color=run_color(name, position), marker="o",
            linestyle="--" if name == "uniform" else "-", elinewidth=0.8, capsize=2, linewidth=1.6, markersize=4,
            label=name.replace("_", " "),
        )  # fmt: skip
