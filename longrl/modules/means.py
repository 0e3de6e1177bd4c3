"""Means of named values over many batches and over ranks, whose names may differ from rank to rank."""

from __future__ import annotations

from collections import Counter

from longrl.strategies.axis import Axis


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

    def collect(self, axis: Axis) -> dict[str, float]:
        """The means, and a new start. Every rank of the axis must call it."""
        sums, counts = axis.sum_dict(self._sums), axis.sum_dict(self._counts)
        self._sums.clear()
        self._counts.clear()
        return {name: total / counts[name] for name, total in sums.items()}
