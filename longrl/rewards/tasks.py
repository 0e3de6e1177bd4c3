"""One place that says which function judges which kind of answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from longrl.rewards.choice import multiple_choice, multiple_choice_lenient, parse_options
from longrl.rewards.exact import exact, exact_lenient
from longrl.rewards.math import math, math_lenient
from longrl.rewards.numeric import gold_number, numeric, numeric_lenient
from longrl.rewards.temporal_iou import gold_intervals, temporal_iou, temporal_iou_lenient

if TYPE_CHECKING:
    from longrl.types import Completion, Row

RewardFn = Callable[["Completion", "Row"], float]

ACCURACY: dict[str, RewardFn] = {
    "multiple_choice": multiple_choice,
    "math": math,
    "numeric": numeric,
    "exact": exact,
    "temporal_iou": temporal_iou,
}
"""`Row.task` -> strict judge: only an answer in its tag (or box) counts. A new kind of answer is one line here."""

LENIENT_ACCURACY: dict[str, RewardFn] = {
    "multiple_choice": multiple_choice_lenient,
    "math": math_lenient,
    "numeric": numeric_lenient,
    "exact": exact_lenient,
    "temporal_iou": temporal_iou_lenient,
}
"""`Row.task` -> judge that reads the text after the thinking when there is no `<answer>`."""


def accuracy(completion: Completion, row: Row) -> float:
    """How right the answer is, in [0, 1], judged by the kind of question, `row.task`; only an answer in its tag counts.

    Raises:
        ValueError: no judge for this task, or a ground truth that its judge cannot read.
    """
    judge = ACCURACY.get(row.task)
    if judge is None:
        raise _unknown_task(row)
    return judge(completion, row)


def accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `accuracy`, reading the text after the thinking when there is no `<answer>`."""
    judge = LENIENT_ACCURACY.get(row.task)
    if judge is None:
        raise _unknown_task(row)
    return judge(completion, row)


def check_answer(row: Row) -> None:
    """Checks that the ground truth of a row can be judged; for a data module, before anything is trained on it.

    Raises:
        ValueError: an empty answer, a letter outside the options, or no number or interval where one is wanted.
    """
    if not row.answer.strip():
        raise ValueError(f"row {row.id!r}: the answer must not be empty; correct or drop the row")
    check = _CHECKS.get(row.task)
    if check is not None:
        check(row)


def _check_choice(row: Row) -> None:
    options = parse_options(row.problem)
    if not options:
        raise ValueError(
            f"row {row.id!r}: a multiple_choice problem must list its options from A on, found none in "
            f"{row.problem[-200:]!r}; write each on its own line as 'A. text', or set another task"
        )
    if row.answer.strip().upper() not in options:
        raise ValueError(
            f"row {row.id!r}: the answer must be one of the options {', '.join(options)}, got {row.answer!r}; "
            "correct the row, or set another task"
        )


_CHECKS: dict[str, Callable[[Row], object]] = {
    "multiple_choice": _check_choice,
    "numeric": gold_number,
    "temporal_iou": gold_intervals,
}


def _unknown_task(row: Row) -> ValueError:
    return ValueError(
        f"row {row.id!r}: accuracy knows the tasks {', '.join(ACCURACY)}, got {row.task!r}; correct the row's task, "
        "or score it with a reward function of its own"
    )
