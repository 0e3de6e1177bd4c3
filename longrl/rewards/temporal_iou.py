"""Temporal grounding: how much of the stated interval and of the true one coincide."""

from __future__ import annotations

from longrl.rewards.answers import lenient_text, strict_text
from longrl.rewards.time_intervals import Interval, parse_intervals
from longrl.types import Completion, Row


def temporal_iou(completion: Completion, row: Row) -> float:
    """Intersection over union of the intervals in `<answer>` and in `row.answer`, in [0, 1].

    Several intervals count as their union, so naming many to be safe lowers the score.

    Raises:
        ValueError: `row.answer` holds no interval.
    """
    return interval_iou(parse_intervals(strict_text(completion.text)), gold_intervals(row))


def temporal_iou_lenient(completion: Completion, row: Row) -> float:
    """As `temporal_iou`; without an `<answer>` the text after the thinking is read instead."""
    return interval_iou(parse_intervals(lenient_text(completion.text)), gold_intervals(row))


def interval_iou(first: list[Interval], second: list[Interval]) -> float:
    """Length of the intersection over length of the union of two sets of intervals; 0.0 when both are empty."""
    union = _covered_s(first + second)
    overlap = _covered_s(first) + _covered_s(second) - union
    return overlap / union if union else 0.0


def gold_intervals(row: Row) -> list[Interval]:
    """The intervals of `row.answer`."""
    intervals = parse_intervals(row.answer)
    if not intervals:
        raise ValueError(
            f"row {row.id!r}: a temporal_iou answer must hold an interval whose end is after its start, "
            f"got {row.answer!r}; write it as '12.5 to 20 s' or '0:12-0:20'"
        )
    return intervals


def _covered_s(intervals: list[Interval]) -> float:
    """Seconds in at least one of the intervals."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.start_s <= merged[-1].stop_s:
            merged[-1] = Interval(merged[-1].start_s, max(merged[-1].stop_s, interval.stop_s))
        else:
            merged.append(interval)
    return sum(interval.stop_s - interval.start_s for interval in merged)
