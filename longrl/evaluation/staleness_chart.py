"""How old the tokens of the last steps were, and how far engine and trainer are apart at each age."""

from __future__ import annotations

import math
import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread

from longrl.evaluation.curves import Metrics, decorate

AVERAGED_STEPS = 50
"""Whose means are drawn."""
SHARES = "rollout/staleness_share_"
MISMATCHES = "train/mismatch_mean_staleness_"


def plot_staleness(metrics: Metrics) -> Figure | None:
    """Bars for each age in rollouts: the share of tokens, and their mismatch; None of a run without such metrics."""
    shares = means_by_age(metrics, SHARES)
    if not shares:
        return None
    figure = Figure(figsize=(8.2, 2.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, {age: 100 * share for age, share in shares.items()}, "Tokens by staleness", "%")
    _draw(right, means_by_age(metrics, MISMATCHES), "Mismatch by staleness", "nats")
    return figure


def means_by_age(metrics: Metrics, prefix: str) -> dict[int, float]:
    """Age -> mean of a metric over the last steps, of ages that have values."""
    means = {}
    for name, points in metrics.items():
        age = re.fullmatch(re.escape(prefix) + r"(\d+)", name)
        values = list(points.values())[-AVERAGED_STEPS:]
        if age and values:
            means[int(age[1])] = math.fsum(values) / len(values)
    return dict(sorted(means.items()))


def _draw(axes: Axes, means: dict[int, float], title: str, unit: str) -> None:
    axes.bar(list(means), list(means.values()), 0.8, color="#2f6db3")
    decorate(axes, title, unit)
    axes.set_xticks(list(means))
    axes.set_xlabel("rollouts", fontsize=8, color="#5b6773")
