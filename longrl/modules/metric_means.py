"""Means of what validation and test say, over batches and ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from longrl.strategies.axis import Axis
from longrl.types import Group, Metrics


class MetricMeans:
    """Means of named values over many batches and over ranks, whose names may differ from rank to rank.

    Example:
        means.add("val/loss", total, count=7)
        means.collect(axis)  # {"val/loss": total / 7}, on all ranks of the axis
    """

    def __init__(self) -> None:
        self._sums: Metrics = defaultdict(float)
        self._counts: Counter[str] = Counter()

    def add(self, name: str, total: float, count: int = 1) -> None:
        """Adds the sum of `count` values."""
        self._sums[name] += total
        self._counts[name] += count

    def add_rewards(self, group: Group[Any, Any], prefix: str, by_category: bool) -> None:
        """Adds reward and parts of the completions that could be rewarded, also under the row's category."""
        category = group.prompt.row.category
        rewards = {"reward": group.rewards, **group.reward_parts}
        for name, values in rewards.items():
            known = values[group.valid & ~values.isnan()]  # a part that does not apply is NaN
            total = float(known.sum())
            self.add(f"{prefix}/{name}", total, len(known))
            if by_category:
                self.add(f"{prefix}/{name}/{category}", total, len(known))

    def collect(self, axis: Axis) -> Metrics:
        """The means, nan of no values, and a new start. Every rank of the axis must call it."""
        sums = axis.sum_dict(self._sums)
        counts = axis.sum_dict(self._counts)
        self._sums.clear()
        self._counts.clear()
        means = {}
        for name, total in sums.items():
            means[name] = math.nan
            if counts[name]:
                means[name] = total / counts[name]
        return means
