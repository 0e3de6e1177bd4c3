"""Charts of accuracies, and the colours and names of runs in them and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread

from longrl.evaluation.curves import decorate
from longrl.evaluation.scores import Scores

RUN_COLORS: dict[str, str] = {
    "blind": "#d5dae0",
    "no video": "#d5dae0",
    "video": "#e07a3f",
    "base": "#9aa7b4",
    "sft": "#4d82bc",
    "rl": "#e07a3f",
}
_OTHER_COLORS = ("#3a9d7c", "#9466b8", "#c4527a", "#c9a227", "#4d82bc", "#7a5c3e", "#5fb0b7", "#39434d")

_BASELINE: dict[str, Any] = {"color": "#6b7681", "linewidth": 1, "linestyle": (0, (4, 3)), "label": "majority answer"}
"""Look of a line at the accuracy of always giving the most frequent answer."""


def run_color(name: str, position: int = 0) -> str:
    """A run's colour in charts and on the page."""
    return RUN_COLORS.get(name.lower(), _OTHER_COLORS[position % len(_OTHER_COLORS)])


def run_label(name: str) -> str:
    """A run's name as readers know it; unknown names stay as they are."""
    return {"base": "Base", "sft": "SFT", "rl": "RL", "blind": "No video"}.get(name, name)


def plot_accuracies(scores: Mapping[str, Scores], chance: float | None = None) -> Figure:
    """Grouped bars: per category one bar and its 95% interval for each run.

    Args:
        scores: run -> category -> score; "overall" comes first.
        chance: accuracy of a baseline, drawn as a dashed line.
    """
    categories = all_categories(scores)
    width = 0.8 / max(len(scores), 1)
    # Bars are as wide in every chart, with room between the categories.
    chart_width = max(5.0, 1.1 + 0.36 * len(scores) * len(categories) + 0.5 * len(categories))
    figure = Figure(figsize=(chart_width, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for position, (run, by_category) in enumerate(scores.items()):
        offset = width * (position - (len(scores) - 1) / 2)
        centers = [index + offset for index, name in enumerate(categories) if name in by_category]
        heights, errors = _bars([by_category[name] for name in categories if name in by_category])
        axes.bar(centers, heights, 0.88 * width, color=run_color(run, position), label=run_label(run))
        axes.errorbar(centers, heights, errors, fmt="none", ecolor="#39434d", elinewidth=1, capsize=2.5)
    if chance is not None:
        axes.axhline(100 * chance, zorder=0, **_BASELINE)
    decorate(axes, "Accuracy with 95% intervals", "%")
    axes.set_xticks(range(len(categories)), [name.replace(" and ", "\nand ") for name in categories], fontsize=8.5)
    axes.set_ylim(0, 105)
    figure.legend(loc="outside upper right", ncols=len(scores) + 1, fontsize=8, frameon=False)
    return figure


def plot_frame_sweep(
    points: Mapping[int, Mapping[str, Any]], chance: float | None = None, blind: Mapping[str, Any] | None = None
) -> Figure:
    """Accuracy and its 95% interval against the number of frames, on a scale of powers of two.

    Args:
        points: frames -> {"accuracy", "low", "high"}.
        chance: accuracy of always giving the most frequent answer, a dashed line.
        blind: score without video, a line with its interval.
    """
    figure = Figure(figsize=(6.4, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    frames = sorted(points)
    heights, errors = _bars([points[count] for count in frames])
    axes.errorbar(
        frames, heights, errors, color=RUN_COLORS["rl"], ecolor="#39434d", elinewidth=1, capsize=3, marker="o",
        linewidth=1.8, markersize=5, label="with video",
    )  # fmt: skip
    if blind is not None:
        axes.axhline(100 * blind["accuracy"], color=RUN_COLORS["base"], linewidth=1.4, label="no video", zorder=0)
        axes.axhspan(100 * blind["low"], 100 * blind["high"], color=RUN_COLORS["blind"], alpha=0.5, zorder=0)
    if chance is not None:
        axes.axhline(100 * chance, **_BASELINE)
    decorate(axes, "Accuracy with 95% intervals against frames", "%")
    axes.set_xscale("log", base=2)
    axes.set_xticks(frames, [str(count) for count in frames])
    axes.minorticks_off()
    axes.set_xlabel("frames", fontsize=8, color="#5b6773")
    axes.margins(x=0.06, y=0.15)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure


def _bars(scores: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Accuracies in percent, and how far their intervals reach below and above."""
    heights = [100 * score["accuracy"] for score in scores]
    # Results of before may lie beside their interval by a rounding, and matplotlib refuses bars of less than 0.
    below = [max(0.0, 100 * (score["accuracy"] - score["low"])) for score in scores]
    above = [max(0.0, 100 * (score["high"] - score["accuracy"])) for score in scores]
    return heights, [below, above]


def all_categories(scores: Mapping[str, Scores]) -> list[str]:
    """Categories of all runs, "overall" first, then in the order of their first appearance."""
    names = list(dict.fromkeys(name for by_category in scores.values() for name in by_category))
    return sorted(names, key=lambda name: name != "overall")
