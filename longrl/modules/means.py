"""Means of named values over many batches and over ranks, whose names may differ from rank to rank."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from longrl.strategies.axis import Axis

if TYPE_CHECKING:
    from longrl.types import Group


class Means:
    """Sums and counts until somebody asks.

    Example:
        means.add("val/loss", total, count=7)
        means.collect(axis)  # {"val/loss": total / 7}, on all ranks of the axis
    """

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, total: float, count: int = 1) -> None:
        """Adds the sum of `count` values."""
        self._sums[name] += total
        self._counts[name] += count

    def add_rewards(self, group: Group, prefix: str, by_category: bool) -> None:
        """Adds reward and parts of the completions that could be rewarded, of the whole and of the row's category."""
        for name, values in {"reward": group.rewards, **group.reward_parts}.items():
            known = values[group.valid]
            self.add(f"{prefix}/{name}", float(known.sum()), len(known))
            if by_category:
                self.add(f"{prefix}/{name}/{group.prompt.row.category}", float(known.sum()), len(known))

    def collect(self, axis: Axis) -> dict[str, float]:
        """The means, nan of no values, and a new start. Every rank of the axis must call it."""
        sums, counts = axis.sum_dict(self._sums), axis.sum_dict(self._counts)
        self._sums.clear()
        self._counts.clear()
        return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}
