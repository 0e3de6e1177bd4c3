"""Intervals of time in texts, in the wordings that grounding models and data sets use."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from longrl.rewards.plain_numbers import end_of_text, plain_characters

MAX_INTERVAL_CHARS = 3000
"""Of a longer text only the end is read."""


class Interval(NamedTuple):
    """A stretch of a video in seconds, `start_s < stop_s`."""

    start_s: float
    stop_s: float


class Time(NamedTuple):
    """A time in a text."""

    seconds: float
    has_unit: bool
    """A clock time, or one with a unit; another one takes the unit of its partner."""
    unit_s: float
    """Seconds of the unit it ends with."""
    start: int
    end: int


def parse_intervals(text: str) -> list[Interval]:
    """All intervals a text states, in order, in seconds.

    - "12.5 to 20 s", "12-20", "0:12-0:20", "2 min 5 s to 3 min", "between 12 and 20";
    - "00:00:12,000 --> 00:00:20,500" (SRT);
    - "[12.5, 20]", `[[12, 20], [30, 40]]`, `{"start": 12, "end": 20}` and other JSON;
    - "starts at 12 s and ends at 20 s", "from 12 s until 20 s", "from 12 s for 8 s", "the 12th to the 20th second";
    - `<12.0 seconds> to <20.0 seconds>` (Qwen3-VL's time marks), `From <t>12.0</t>s to <t>20.0</t>s` (Open-o3-Video);
    - "12 and 20" and "12, 20" where no other time stands.

    A time without a unit takes the other's ("2 to 3 minutes"), else seconds. Frame numbers, percentages and dates are
    no times, and neither is what stands behind a decimal comma: of "12,5 to 20,5 s" nothing is read. Intervals that do
    not end after they start are left out.
    """
    plain = end_of_text(plain_characters(end_of_text(text, MAX_INTERVAL_CHARS)), MAX_INTERVAL_CHARS)
    times = read_times(plain)
    intervals = []
    index = num_used = 0
    while index + 1 < len(times):
        relation = _relation(plain, times, index)
        if index > num_used and plain[times[index - 1].end : times[index].start] == ",":  # 12,5
            relation = None
        if relation is None and len(times) == 2 and _GLUE.fullmatch(_bare(plain[times[0].end : times[1].start])):
            relation = "start to stop"
        if relation is None:
            index += 1
            continue
        interval = _interval(times[index], times[index + 1], relation)
        if interval.start_s < interval.stop_s:
            intervals.append(interval)
        index = num_used = index + 2
    return intervals


# ---- times ----

_HOUR, _MINUTE = r"(?:hours?|hrs?|h)(?![a-z])", r"(?:minutes?|mins?|m|\u5206\u949f|\u5206)(?![a-z])"
_SECOND = r"(?:milliseconds?|msecs?|ms|seconds?|secs?|s|\u79d2)(?![a-z])"
_AMOUNT = r"\d{1,7}(?:\.\d{1,6})?"
_NTH = r"(?:(?:st|nd|rd|th)(?![a-z]))?"
_MORE = rf"[\s,]*(?:and\s+)?{_AMOUNT}\s*"
_TIME = re.compile(
    r"(?<![A-Za-z0-9_])(?<!\d[.:])(?:"
    r"(?P<clock>(?:\d{1,3}:)?\d{1,3}:\d{2}(?:[.,]\d{1,6})?(?![\d:]))"
    r"""|(?P<prime>\d{1,3}'\d{2}(?:\.\d+)?")"""
    rf"|(?P<units>{_AMOUNT}{_NTH}(?:\s*|-)"
    rf"(?:{_HOUR}(?:{_MORE}{_MINUTE})?(?:{_MORE}{_SECOND})?|{_MINUTE}(?:{_MORE}{_SECOND})?|{_SECOND}))"
    rf"|(?P<plain>{_AMOUNT}){_NTH}(?![A-Za-z0-9_:%]|\.\d|,\d{{3}})"
    r")",
    re.IGNORECASE,
)
_PART = re.compile(rf"({_AMOUNT}){_NTH}(?:\s*|-)({_HOUR}|{_MINUTE}|{_SECOND})", re.IGNORECASE)
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "\u5206": 60.0, "\u79d2": 1.0}
_NO_TIME_BEFORE = re.compile(
    r"(?:\b(?:frames?|scene|event|step|question|shot|segment|part|person|player|number|no\.|iou)\s*|#|[$\u20ac\u00a3])$",
    re.IGNORECASE,
)
_NO_TIME_AFTER = re.compile(
    r"\s*(?:%|percent\b|frames?\b|fps\b|people\b|persons?\b|men\b|women\b|times\b|years?\b|days?\b|meters?\b|cm\b|km\b)",
    re.IGNORECASE,
)


def read_times(plain: str) -> list[Time]:
    """All times of a text, in order; numbers of other things are left out."""
    times = []
    for match in _TIME.finditer(plain):
        before = plain[max(0, match.start() - 12) : match.start()]
        if _NO_TIME_BEFORE.search(before) or _NO_TIME_AFTER.match(plain[match.end() : match.end() + 12]):
            continue
        if match["clock"] or match["prime"]:
            seconds = 0.0
            for part in re.findall(r"\d+(?:[.,]\d+)?", match[0]):
                seconds = 60 * seconds + float(part.replace(",", "."))
            times.append(Time(seconds, True, 1.0, match.start(), match.end()))
        elif match["units"]:
            parts = [(float(amount), _unit_seconds(unit)) for amount, unit in _PART.findall(match["units"])]
            total = sum(amount * unit_s for amount, unit_s in parts)
            times.append(Time(total, True, parts[-1][1] if len(parts) == 1 else 1.0, match.start(), match.end()))
        else:
            times.append(Time(float(match["plain"]), False, 1.0, match.start(), match.end()))
    return times


def _unit_seconds(unit: str) -> float:
    if unit.lower() == "ms" or unit.lower().startswith(("milli", "msec")):
        return 0.001
    return _SECONDS[unit[0].lower()]


# ---- what two neighbours are to each other ----

Relation = Literal["start to stop", "stop to start", "start and length"]

_REACH = 120
_NOISE = re.compile(
    r"</?[a-z]\w*>|\(\s*(?:start|begin|end|stop)\s*\)|<\|?|(?<![=-])\|?>|(?<![a-z])(?:the|at|about|around|approximately|approx|roughly|exactly|mark|marks|point|"
    r"seconds?|secs?|s|minutes?|mins?|time|times?|stamps?|timestamps?|t|is|video|clip|in|into|of|on|onwards?|all|way|up)(?![a-z])|"
    r"=(?!>)|[\"'`*_|:{}\s.]+|\u7b2c",
)
_RANGE = re.compile(r"[)\]]?,?(?:=>|-+>?|\u2192|~|to|until|till|through|thru|\u5230|\u81f3|\u304b\u3089)~?[(\[]?")
_LISTED = re.compile(r"[,;]?")
_GLUE = re.compile(r"and|&|[,;]?")
_OPENS = re.compile(r"[\[({<][\s\"'<]*(?:[a-z]\s*=\s*)?$", re.IGNORECASE)
_CLOSES = re.compile(r"[\s\"'>]*[\])}]")
_CUTS = re.compile(r"[\])}]\s*,?\s*[\[({]")
_START = re.compile(r"(?<![a-z])(?:start(?:s|ed|ing)?|beg[ai]n(?:s|ning)?|from|onset|commenc(?:es|ing)|opens)(?![a-z])")
_STOP = re.compile(
    r"(?<![a-z])(?:end(?:s|ed|ing)?|stop(?:s|ped|ping)?|finish(?:es|ed|ing)?|conclud(?:es|ing)|until|till|to|offset|closes)(?![a-z])"
)
_LENGTH = re.compile(r"(?<![a-z])(?:last(?:s|ed|ing)|duration|length|for|continu(?:es|ing) for)(?![a-z])")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|_")
_BETWEEN = re.compile(r"\bbetween\s+(?:the\s+|about\s+|around\s+|roughly\s+)?$", re.IGNORECASE)


def _relation(plain: str, times: list[Time], index: int) -> Relation | None:
    """What the time at an index and the next one are to each other; None when they belong to no interval."""
    first, second = times[index], times[index + 1]
    gap = plain[first.end : second.start]
    if len(gap) > _REACH:
        return None
    begin = times[index - 1].end if index else 0
    before = plain[max(begin, first.start - _REACH) : first.start]
    bare = _bare(gap)
    if _RANGE.fullmatch(bare):
        return None if _is_date(plain, times, index) else "start to stop"
    if bare == "and" and _BETWEEN.search(before):
        return "start to stop"
    if _LISTED.fullmatch(bare) and _OPENS.search(before) and _CLOSES.match(plain, second.end):
        return None if _CUTS.search(gap) else "start to stop"
    return _labelled(before, gap)


def _bare(gap: str) -> str:
    """What stands between two times without units, articles, quotation marks and space."""
    return _NOISE.sub("", gap.lower().strip().removeprefix(">"))


def _labelled(before: str, gap: str) -> Relation | None:
    """What words say of two times: "start: 12, end: 20", in either order, or "starts at 12 and lasts 8"."""
    before, gap = _CAMEL.sub(" ", before).lower(), _CAMEL.sub(" ", gap).lower()
    starts, stops = list(_START.finditer(before)), list(_STOP.finditer(before))
    last_start = starts[-1].start() if starts else -1
    last_stop = stops[-1].start() if stops else -1
    if last_start > last_stop and not _START.search(gap):
        if _STOP.search(gap):
            return "start to stop"
        return "start and length" if _LENGTH.search(gap) else None
    if last_stop > last_start and _START.search(gap) and not _STOP.search(gap):
        return "stop to start"
    return None


def _is_date(plain: str, times: list[Time], index: int) -> bool:
    """Whether one more number hangs on the two: 2024-01-05."""
    if plain[times[index].end : times[index + 1].start] != "-":
        return False
    start, end = times[index].start, times[index + 1].end
    around = plain[max(0, start - 2) : start], plain[end : end + 2]
    hangs = re.search(r"\d-$", around[0]) or re.match(r"-\d", around[1])
    return hangs is not None and not times[index].has_unit


def _interval(first: Time, second: Time, relation: Relation) -> Interval:
    # A number without a unit takes the other's.
    one, two = first.seconds, second.seconds
    if not first.has_unit and second.has_unit:
        one *= second.unit_s
    elif first.has_unit and not second.has_unit:
        two *= first.unit_s
    if relation == "start and length":
        return Interval(one, one + two)
    return Interval(one, two) if relation == "start to stop" else Interval(two, one)
