"""Temporal grounding: how much of the stated interval and of the true one coincide."""

from __future__ import annotations

import re
from typing import NamedTuple

from longrl.rewards.answers import lenient_text, strict_text
from longrl.types import Completion, Row


class Interval(NamedTuple):
    """A stretch of a video in seconds, `start_s < stop_s`."""

    start_s: float
    stop_s: float


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


# ---- reading intervals ----

_UNIT = r"(?:h|hours?|hrs?|m|min|mins|minutes?|s|secs?|seconds?)(?![a-z])"
_TIME = (
    r"(?:(?:\d+:)?\d{1,3}:\d{2}(?:\.\d+)?(?![\d:])"  # h:mm:ss, mm:ss
    rf"|\d+(?:\.\d+)?(?:\s*{_UNIT}(?:[\s,]*\d+(?:\.\d+)?\s*{_UNIT}){{0,2}})?)"  # 12.5, 12 s, 2 min 5 s
)
_CLOCK_UNIT = r"(?:\s*(?:seconds?|secs?|s)(?![a-z]))?"  # "0:12 s"
_PATTERNS = "|".join(
    pattern.format(first=rf"(?P<start{i}>{_TIME}){_CLOCK_UNIT}", second=rf"(?P<stop{i}>{_TIME})")
    for i, pattern in enumerate(
        (
            r"{first}\s*(?:-+>?|\u2013|\u2014|\u2212|\u2192|~|\b(?:to|until|till|through)\b)\s*{second}",
            r"between\s+{first}\s+and\s+{second}",
            r"[\[(]\s*{first}\s*,\s*{second}\s*[\])]",
        )
    )
)
_INTERVAL = re.compile(rf"(?<![\w.:])(?:{_PATTERNS})", re.IGNORECASE)
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_intervals(text: str) -> list[Interval]:
    """All intervals a text states, in order, in seconds.

    Reads "12.5 to 20 s", "12-20", "0:12-0:20", "1:02:03 - 1:04:00", "2 min 5 s to 3 min", "between 12 and 20" and
    "[12.5, 20]". A time without a unit takes the other's ("2 to 3 minutes"), else seconds. Intervals that do not end
    after they start are left out.
    """
    intervals = []
    for match in _INTERVAL.finditer(text):
        # One of the patterns matched: its two groups.
        start, stop = filter(None, match.groups())
        units = re.findall(r"[a-z]+", stop.lower())
        unit = units[0][0] if len(units) == 1 else "s"
        interval = Interval(_seconds(start, unit), _seconds(stop, "s"))
        if interval.start_s < interval.stop_s:
            intervals.append(interval)
    return intervals


def _seconds(time: str, default_unit: str) -> float:
    if ":" in time:
        seconds = 0.0
        for part in time.split(":"):
            seconds = 60 * seconds + float(part)
        return seconds
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", time.lower())
    return sum(float(value) * _SECONDS[(unit or default_unit)[0]] for value, unit in parts)
