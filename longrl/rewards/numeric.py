"""Numbers: right within a tolerance, or right by degrees."""

from __future__ import annotations

import math

from longrl.rewards.answers import lenient_text, strict_text
from longrl.rewards.number_readings import Reading, last_number, read_numbers, settled_number
from longrl.rewards.plain_numbers import plain_number_text
from longrl.types import Completion, Row

DEFAULT_TOLERANCE = 0.005
"""Equal when rounded to two decimals, as Video-R1 (arXiv:2503.21776) scores; `row.metadata["tolerance"]` overrides."""


def numeric(completion: Completion, row: Row) -> float:
    """1.0 when the number that `<answer>` gives is within the tolerance of `row.answer`, else 0.0.

    Where one of the two is a percentage, 50% is right for 50 and for 0.5.

    Raises:
        ValueError: `row.answer` is not one number.
    """
    return _is_close(settled_number(strict_text(completion.text)), row)


def numeric_lenient(completion: Completion, row: Row) -> float:
    """As `numeric`; without an `<answer>` the number that the text after the thinking gives, else its last one."""
    if strict_text(completion.text):
        return numeric(completion, row)
    return _is_close(last_number(lenient_text(completion.text)), row)


def mean_relative_accuracy(completion: Completion, row: Row) -> float:
    """Mean relative accuracy (VSI-Bench, arXiv:2412.14171).

    The share of the thresholds t = 0.50, 0.55, .. 0.95 for which |x - gold| / |gold| < 1 - t.
    """
    return _mean_over_thresholds(settled_number(strict_text(completion.text)), row)


def mean_relative_accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `mean_relative_accuracy`; without an `<answer>` the number of the text after the thinking, or its last."""
    if strict_text(completion.text):
        return mean_relative_accuracy(completion, row)
    return _mean_over_thresholds(last_number(lenient_text(completion.text)), row)


def regression_accuracy(completion: Completion, row: Row) -> float:
    """1 - the relative error of the number in `<answer>`, at least 0: Video-R1's graded regression (arXiv:2503.21776).

    At a ground truth of 0 only 0 is right; the released code gives nothing to it either.
    """
    return _relative_accuracy(settled_number(strict_text(completion.text)), row)


def regression_accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `regression_accuracy`; without an `<answer>` the number of the text after the thinking, or its last."""
    if strict_text(completion.text):
        return regression_accuracy(completion, row)
    return _relative_accuracy(last_number(lenient_text(completion.text)), row)


def number(text: str) -> float | None:
    """The number a text gives; None when it gives none, several, or one that is not understood as a whole.

    Digits with separators of thousands or decimals, words ("one hundred and five", "three quarters", "a dozen"),
    fractions and mixed numbers, powers, multipliers ("3k", "1.2 million"), LaTeX, equations, and numerals of Chinese.
    A unit or a percent sign is left out.

    Example:
        "1,234 people" is 1234, "3 and a half" 3.5, "2 + 2 = 4" is 4, "3 red and 2 blue, 5 in total" is 5; "40-42",
        "3 or 4", "more than 5", "1:30", "not 5", "4 2" and "5 of 7" are None.
    """
    reading = settled_number(text)
    return None if reading is None else reading.value


def numbers(text: str) -> list[float | None]:
    """All numbers of a text in order; None where one is not understood."""
    return [reading.value for reading in read_numbers(plain_number_text(text))]


def gold_number(row: Row) -> float:
    """`row.answer` as a number."""
    return _gold_reading(row)[0]


def _gold_reading(row: Row) -> tuple[float, bool]:
    """`row.answer` as a number, and whether it is a percentage."""
    gold = settled_number(row.answer)
    if gold is None or gold.value is None:
        raise ValueError(
            f"row {row.id!r}: the answer of a numeric question must be one number, got {row.answer!r}; "
            "correct the row or give it task='exact'"
        )
    return gold.value, gold.is_percent


def _mean_over_thresholds(said: Reading | None, row: Row) -> float:
    error = _relative_error(said, row)
    # The billionth keeps an error that is equal to a threshold outside of it, however both are rounded.
    return sum(error < 0.5 - 0.05 * step - 1e-9 for step in range(10)) / 10


def _relative_accuracy(said: Reading | None, row: Row) -> float:
    return max(0.0, 1.0 - _relative_error(said, row))


def _relative_error(said: Reading | None, row: Row) -> float:
    """|x - gold| / |gold|; of no number, and of another one than 0 where gold is 0, infinite."""
    gold = gold_number(row)
    if said is None or said.value is None:
        return math.inf
    if gold == 0:
        return 0.0 if said.value == 0 else math.inf
    return abs(said.value - gold) / abs(gold)


def _is_close(said: Reading | None, row: Row) -> float:
    gold, gold_is_percent = _gold_reading(row)
    if said is None or said.value is None:
        return 0.0
    tolerance = float(row.metadata.get("tolerance", DEFAULT_TOLERANCE)) + 1e-9  # 3.145 - 3.14 is a hair over
    golds = [gold]
    if said.is_percent and not gold_is_percent:
        golds.append(100 * gold)
    value = said.value
    is_right = any(abs(value - each) <= tolerance for each in golds)
    if gold_is_percent and not said.is_percent:
        is_right = is_right or abs(100 * value - gold) <= tolerance
    return float(is_right)
