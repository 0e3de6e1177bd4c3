"""Numbers: right within a tolerance, or right by degrees."""

from __future__ import annotations

import math
import re

from longrl.rewards.answers import lenient_text, strict_text
from longrl.types import Completion, Row

DEFAULT_TOLERANCE = 0.005
"""Equal when rounded to two decimals, as Video-R1 (arXiv:2503.21776) scores; `row.metadata["tolerance"]` overrides."""

_NUMBER = re.compile(
    r"(?<![\w.])([-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+)"
    r"(?:\s*/\s*(\d+(?:\.\d+)?))?"
)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


def numeric(completion: Completion, row: Row) -> float:
    """1.0 when the only number in `<answer>` is within the tolerance of `row.answer`, else 0.0.

    Raises:
        ValueError: `row.answer` is not one number.
    """
    return _is_close(number(strict_text(completion.text)), row)


def numeric_lenient(completion: Completion, row: Row) -> float:
    """As `numeric`; without an `<answer>` the last number after the thinking counts."""
    if strict_text(completion.text):
        return numeric(completion, row)
    values = numbers(lenient_text(completion.text))
    return _is_close(values[-1] if values else None, row)


def mean_relative_accuracy(completion: Completion, row: Row) -> float:
    """Mean relative accuracy (VSI-Bench, arXiv:2412.14171).

    The share of the thresholds t = 0.50, 0.55, .. 0.95 for which |x - gold| / |gold| < 1 - t.
    """
    said, gold = number(strict_text(completion.text)), gold_number(row)
    if said is None:
        return 0.0
    if gold == 0:
        return float(said == 0)
    error = abs(said - gold) / abs(gold)
    return sum(error < 0.5 - 0.05 * step for step in range(10)) / 10


def number(text: str) -> float | None:
    """The number a text gives; None when it gives none, or several different ones."""
    values = set(numbers(text))
    return values.pop() if len(values) == 1 else None


def numbers(text: str) -> list[float]:
    """All numbers in order: "1,234", "-0.5", "3/4", "1e-3"; a unit or a percent sign is left out.

    Number words (zero to twenty) count only in a text without digits.
    """
    text = text.replace("\u2212", "-")
    values = []
    for match in _NUMBER.finditer(text):
        numerator = float(match[1].replace(",", ""))
        denominator = float(match[2] or 1)
        values.append(numerator / denominator if denominator else math.inf)
    if values:
        return values
    words = _WORDS.split()
    return [float(words.index(word)) for word in re.findall(r"[a-z]+", text.lower()) if word in words]


def gold_number(row: Row) -> float:
    """`row.answer` as a number."""
    gold = number(row.answer)
    if gold is None:
        raise ValueError(
            f"row {row.id!r}: the answer of a numeric question must be one number, got {row.answer!r}; "
            "correct the row or give it task='exact'"
        )
    return gold


def _is_close(said: float | None, row: Row) -> float:
    tolerance = float(row.metadata.get("tolerance", DEFAULT_TOLERANCE))
    gold = gold_number(row)
    return float(said is not None and abs(said - gold) <= tolerance + 1e-9)  # 3.145 - 3.14 is a hair over
