"""Charts of a scoreboard: accuracy against what it cost, with intervals, baselines and the front of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from longrl.evaluation.charts import run_color
from longrl.evaluation.curves import decorate
from longrl.evaluation.label_places import Bar, Label, place_labels
from longrl.evaluation.scoreboard_rows import ScoreboardGroup, ScoreboardRow
from longrl.evaluation.scores import OVERALL, Score

COST_NAMES: Mapping[str, str] = {
    "frames": "frames",
    "prompt_tokens": "prompt tokens",
    "media_tokens": "video tokens",
    "completion_tokens": "generated tokens",
    "decode_s": "seconds of decoding",
    "decode_spent_s": "seconds of decoding in this run",
    "encode_flops": "encoder operations",
    "encode_spent_flops": "encoder operations in this run",
    "prefill_flops": "prefill operations",
    "generate_flops": "operations of generating",
    "total_flops": "operations in all",
}
"""Cost of a question -> as readers know it."""
LOG_FROM = 4.0
"""Ratio of the largest cost to the least from which the axis is logarithmic."""
MAX_NAMED = 14
"""Points beyond which a chart shows rows' numbers in place of their conditions."""
INK, SOFT = "#39434d", "#6b7681"
PUBLISHED = "#8a6d3b"
MAX_PANELS = 12
WIDTH = 11.6
"""Inches of a chart, which fill a page of 1120 pixels."""
LETTERS = 9.5
"""Points of letters, which a page shows at two thirds."""
MARGIN = 0.09
"""Share of the range of costs that is left free on both sides."""
DODGE = 4.5
"""Points from the interval of one run to that of the next at the same cost."""


@dataclass(frozen=True)
class PublishedPoint:
    """A published accuracy at a known number of frames."""

    label: str
    cost: float
    accuracy: float


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, accuracy) than which none is both as cheap and better, by cost.

    Example:
        `pareto_front([(1, .2), (2, .1), (3, .5)])` is `[(1, .2), (3, .5)]`.
    """
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def plot_against_cost(group: ScoreboardGroup, cost: str, published: Sequence[PublishedPoint] = ()) -> Figure | None:
    """Accuracy of each row and its 95% interval against a cost; None where no row says it.

    Args:
        group: rows about the same questions.
        cost: name of a cost.
        published: figures to show beside, whose cost is the same.
    """
    rows = _with_cost(group, cost)
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 5.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, group, rows, cost, lambda row: row.overall)
    front = pareto_front([(_cost(row, cost), row.overall.accuracy) for row in rows])
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        axes.step(xs, [100 * y for y in ys], where="post", color="#b8c1ca", linewidth=5, alpha=0.55, zorder=0.5,
                  label="best at its cost", solid_capstyle="round")  # fmt: skip
    for point in published:
        axes.plot(point.cost, 100 * point.accuracy, "D", markersize=6.5, markerfacecolor="white",
                  markeredgecolor=PUBLISHED, markeredgewidth=1.4, zorder=3)  # fmt: skip
    if published:
        axes.plot([], [], "D", markersize=6.5, markerfacecolor="white", markeredgecolor=PUBLISHED, label="published")
    _draw_baselines(axes, group, lambda row: row.overall, with_majority=True)
    decorate(axes, f"Accuracy with 95% intervals against {COST_NAMES[cost]} of a question", "%")
    _scale(axes, cost, [*(_cost(row, cost) for row in rows), *(point.cost for point in published)])
    _limit_heights(axes, [row.overall for row in group.rows], [point.accuracy for point in published], group.majority)
    axes.set_xlabel(COST_NAMES[cost], fontsize=LETTERS, color="#5b6773")
    axes.tick_params(labelsize=LETTERS)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=LETTERS + 1, color="#22303c")
    figure.legend(loc="outside lower center", ncols=5, fontsize=LETTERS, frameon=False)
    place_labels(figure, axes, _labels(group, rows, cost, published), _bars(group, rows, cost))
    return figure


def plot_other_costs(group: ScoreboardGroup, costs: Sequence[str]) -> Figure | None:
    """Small charts of the same accuracies against further costs; None where none is known."""
    known = [cost for cost in costs if len({_cost(row, cost) for row in _with_cost(group, cost)}) > 1]
    if not known:
        return None

    def draw(axes: Axes, cost: str) -> None:
        rows = _with_cost(group, cost)
        _draw(axes, group, rows, cost, lambda row: row.overall)
        _draw_baselines(axes, group, lambda row: row.overall, with_majority=True)
        decorate(axes, COST_NAMES[cost])
        _scale(axes, cost, [_cost(row, cost) for row in rows])
        _limit_heights(axes, [row.overall for row in group.rows], (), group.majority)

    return _panels(known, draw)


def plot_by_group(
    group: ScoreboardGroup, cost: str, scores: Callable[[ScoreboardRow], Mapping[str, Score]]
) -> Figure | None:
    """Small charts of accuracy against a cost, one for each category or value; None where fewer than two have scores.

    Args:
        group: rows about the same questions.
        cost: name of a cost.
        scores: of a row, by category or value.
    """
    rows = _with_cost(group, cost)
    names = list(dict.fromkeys(name for row in rows for name in scores(row) if name != OVERALL))
    if len(names) < 2:
        return None

    def draw(axes: Axes, name: str) -> None:
        known = [row for row in rows if name in scores(row)]
        _draw(axes, group, known, cost, lambda row: scores(row)[name])
        _draw_baselines(axes, group, lambda row: scores(row).get(name))
        decorate(axes, name if len(name) <= 34 else f"{name[:31]}...")
        _scale(axes, cost, [_cost(row, cost) for row in rows])
        axes.set_ylim(0, 102)

    return _panels(names[:MAX_PANELS], draw)


# ---- parts of charts ----


def _panels(names: Sequence[str], draw: Callable[[Axes, str], None]) -> Figure:
    """Small charts in rows of three or so, with one legend."""
    columns = min(len(names), 4 if len(names) in (4, 7, 8) or len(names) > 9 else 3)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 2.5 * lines + 0.5), dpi=130, layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, place + 1)
        draw(axes, name)
        axes.tick_params(labelsize=LETTERS - 1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=LETTERS, frameon=False)
    return figure


def _draw(
    axes: Axes, group: ScoreboardGroup, rows: Sequence[ScoreboardRow], cost: str,
    score_of: Callable[[ScoreboardRow], Score],
) -> None:  # fmt: skip
    """Points of each run with their intervals, in the order of their costs."""
    figure = axes.get_figure()
    assert figure is not None, "it is drawn on one"
    for run, color in _colors(group).items():
        own = sorted((row for row in rows if row.run == run), key=lambda row: _cost(row, cost))
        if not own:
            continue
        scores = [score_of(row) for row in own]
        heights = [100 * score.accuracy for score in scores]
        below = [max(0.0, 100 * (score.accuracy - score.interval[0])) for score in scores]
        above = [max(0.0, 100 * (score.interval[1] - score.accuracy)) for score in scores]
        axes.errorbar(
            [_cost(row, cost) for row in own], heights, [below, above], color=color, ecolor=color, elinewidth=1,
            capsize=2.5, marker="o", markersize=5, linewidth=1.6, label=run, zorder=2,
            transform=axes.transData + ScaledTranslation(_dodge(group, run) / 72, 0, figure.dpi_scale_trans),
        )  # fmt: skip


def _draw_baselines(
    axes: Axes, group: ScoreboardGroup, score_of: Callable[[ScoreboardRow], Score | None], with_majority: bool = False
) -> None:
    """Lines of what was answered without video, and of always giving the most frequent answer."""
    colors = _colors(group)
    alone = len(group.blind) == 1
    for row in group.blind:
        score = score_of(row)
        if score is None:
            continue
        color = SOFT if alone else colors[row.run]
        label = "no video" if alone else "no video, by run" if row is group.blind[0] else None
        axes.axhline(100 * score.accuracy, color=color, linewidth=1.2, linestyle=(0, (1, 1.5)), label=label, zorder=1)
        if alone:
            low, high = score.interval
            axes.axhspan(100 * low, 100 * high, color="#d5dae0", alpha=0.4, zorder=0, linewidth=0)
    if with_majority and group.majority is not None:
        axes.axhline(
            100 * group.majority, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="majority answer", zorder=1
        )


def _scale(axes: Axes, cost: str, values: Sequence[float]) -> None:
    """Limits, a logarithmic axis for costs that differ by much, and readable ticks."""
    low, high = min(values), max(values)
    unit = EngFormatter(sep="") if cost.endswith("flops") else FuncFormatter(lambda value, _: f"{value:,.5g}")
    if low > 0 and high >= LOG_FROM * low:
        axes.set_xscale("log", base=2 if cost == "frames" else 10)
        room = (high / low) ** MARGIN
        axes.set_xlim(low / room, high * room)
        distinct = sorted(set(values))
        if cost == "frames" and len(distinct) <= 8:
            axes.set_xticks(distinct, [f"{value:,.0f}" for value in distinct])
        else:
            subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=6))
            axes.xaxis.set_major_formatter(unit)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        return
    room = MARGIN * ((high - low) or abs(high) or 1.0)
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(unit)


def _limit_heights(axes: Axes, scores: Sequence[Score], others: Sequence[float], majority: float | None) -> None:
    """From below the lowest interval to above the highest, in steps of ten."""
    lows = [score.interval[0] for score in scores] + list(others) + ([] if majority is None else [majority])
    highs = [score.interval[1] for score in scores] + list(others) + ([] if majority is None else [majority])
    low, high = 10 * math.floor(10 * min(lows)), 10 * math.ceil(10 * max(highs))
    axes.set_ylim(max(0, low) - 1, min(100, max(high, low + 20)) + 1)


def _labels(
    group: ScoreboardGroup, rows: Sequence[ScoreboardRow], cost: str, published: Sequence[PublishedPoint]
) -> list[Label]:
    by_number = len(rows) > MAX_NAMED or (cost == "frames" and len({row.run for row in rows}) > 1)
    colors = _colors(group)
    labels = []
    for row in rows:
        text = f"{row.number}" if by_number else f"{row.number}: {row.condition}"
        labels.append(
            Label(
                text,
                _cost(row, cost),
                100 * row.overall.accuracy,
                colors[row.run],
                shift=_dodge(group, row.run),
                size=LETTERS,
            )
        )
    labels += [Label(point.label, point.cost, 100 * point.accuracy, PUBLISHED, size=LETTERS) for point in published]
    return labels


def _bars(group: ScoreboardGroup, rows: Sequence[ScoreboardRow], cost: str) -> list[Bar]:
    """Intervals, which labels should not hide."""
    return [
        Bar(_cost(row, cost), 100 * row.overall.interval[0], 100 * row.overall.interval[1], _dodge(group, row.run))
        for row in rows
    ]


def _dodge(group: ScoreboardGroup, run: str) -> float:
    """Points by which a run is drawn to the right, for runs of equal costs not to hide each other."""
    runs = list(dict.fromkeys(row.run for row in group.shown))
    return DODGE * (runs.index(run) - (len(runs) - 1) / 2) if run in runs else 0.0


def _colors(group: ScoreboardGroup) -> dict[str, str]:
    runs = dict.fromkeys(row.run for row in group.rows)
    return {run: run_color(run, position) for position, run in enumerate(runs)}


def _with_cost(group: ScoreboardGroup, cost: str) -> list[ScoreboardRow]:
    return [row for row in group.shown if row.cost(cost) is not None]


def _cost(row: ScoreboardRow, cost: str) -> float:
    value: Any = row.cost(cost)
    return float(value)
