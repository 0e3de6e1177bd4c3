"""Options that are numbers, and the range that each must lie in."""

from __future__ import annotations

import math
from typing import Any

Range = tuple[float, float]
COUNT: Range = (1, math.inf)
NOT_NEGATIVE: Range = (0, math.inf)
SHARE: Range = (0, 1)


def check_ranges(options: Any, where: str = "", /, **ranges: Range) -> None:
    """Raises ValueError for an option that is out of its range, infinite or no number; None is no value.

    Args:
        options: has them as attributes.
        where: their group, as a user writes it: `split.`.
        ranges: lowest and highest value by name, both allowed.
    """
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is None or (low <= value <= high and math.isfinite(value)):
            continue
        allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
        raise ValueError(f"{where}{name} must be {allowed}, got {value}; correct it, or leave it out for the default")
