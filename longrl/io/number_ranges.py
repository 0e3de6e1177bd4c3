"""Options that are numbers, and the range that each must lie in."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

Range = tuple[float, float]
LEAST = math.ulp(0.0)
MOST = sys.float_info.max
COUNT: Range = (1, MOST)
NOT_NEGATIVE: Range = (0, MOST)
SHARE: Range = (0, 1)
FINITE: Range = (-MOST, MOST)
LIMIT_OR_ZERO: Range = (0, math.inf)
"""Infinite is no limit."""
SECONDS: Range = (LEAST, 1e9)
"""That something waits for: the system's clocks take no more."""
SECONDS_OR_ZERO: Range = (0, 1e9)


def check_ranges(options: Any, where: str = "", /, **ranges: Range) -> None:
    """Raises ValueError for an option that is out of its range or no number; None is no value.

    Args:
        options: has them as attributes, or by name.
        where: their group, as a user writes it: `split.`.
        ranges: lowest and highest value by name, both allowed.
    """
    for name, (low, high) in ranges.items():
        value = options[name] if isinstance(options, Mapping) else getattr(options, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            allowed = _allowed(low, high)
            raise ValueError(
                f"{where}{name} must be {allowed}, got {value!r}; correct it, or leave it out for the default"
            )


def _allowed(low: float, high: float) -> str:
    """A range in words."""
    if low == -MOST:
        return "a finite number"
    least = "above 0" if low == LEAST else f"at least {low:g}"
    return least if high >= MOST else f"{least} and at most {high:g}"
