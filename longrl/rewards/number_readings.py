"""Which number a text gives: what denies a number, bounds it, makes a range of two, or concludes with one of many."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from longrl.rewards.number_expressions import Reading, read_expressions
from longrl.rewards.plain_numbers import MAX_NUMBER_CHARS, end_of_text, last_boxed, plain_number_text

REACH = 60
"""Characters before and after a number that can tell how it is meant."""

# ---- what stands around one number ----

_SOFT = r"(?:just|only|exactly|really|quite|the|a|an|equal to|about|simply|necessarily|number|be)"
_DENIED = re.compile(
    rf"(?:\b(?:not|cannot|never|no|nor|neither|without|(?:anything|all|everything) but|except(?: for)?|other than|rather than|instead of|unlike)|n't|n\u2019t)\s+"
    rf"(?:{_SOFT}\s+){{0,3}}$|!=\s*$|(?:\u4e0d\u662f|\u5e76\u975e|\u800c\u975e)\s*$",
    re.IGNORECASE,
)
_BOUNDED_BEFORE = re.compile(
    r"(?:\b(?:less|fewer|more|greater|larger|smaller|higher|lower|longer|shorter|bigger|older|younger|better|other) than"
    r"(?: or equal to)?"
    r"|\bat (?:least|most)|\bup to|\b(?:over|under|above|below|beyond|within|exceed(?:s|ing)?|fewer|past)"
    r"|\b(?:minimum|maximum|min|max)(?: of)?|\bas (?:many|much|few|little|high|low|long) as|\bplus or minus"
    r"|\b(?:square|cube|cubic|fourth) root of|\b(?:root|square|cube|logarithm|log|half|double|twice|triple|factorial) of"
    r"|\b(?:twice|double|triple))\s+(?:(?:the|a|an|about|roughly)\s+){0,2}$"
    r"|(?:[<>]=?|\u00b1|\+/-)\s*$"
    r"|(?:\u4e0d\u5230|\u5c11\u4e8e|\u591a\u4e8e|\u8d85\u8fc7|\u5927\u4e8e|\u5c0f\u4e8e|\u81f3\u5c11|\u6700\u591a|\u81f3\u591a|\u4e0d\u8d85\u8fc7"
    r"|\u4e0d\u8db3|\u6700\u5c11)\s*$",
    re.IGNORECASE,
)
_BOUNDED_AFTER = re.compile(
    r"\s+(?:[^\W\d]+\s+){0,2}?(?:or (?:more|less|fewer|greater|above|below|over|under|higher|lower)\b"
    r"|and (?:above|below|over|under|up)\b|(?:at (?:least|most)|minimum|maximum|plus)\b)"
    r"|\s*(?:\u00b1|\+/-|[<>]|\u2030)"
    r"|\s*\S{0,3}?(?:\u4ee5\u4e0a|\u4ee5\u4e0b|\u4ee5\u5185|\u672a\u6e80|\u672a\u6ee1|\s?\uc774\uc0c1|\s?\uc774\ud558|\s?\ubbf8\ub9cc|\s?\ucd08\uacfc)",
    re.IGNORECASE,
)
_MONTH = r"\b(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)(?:uary|ruary|ch|il|e|y|ust|tember|ober|ember)?\b\.?"
_MONTH_BEFORE = re.compile(rf"(?-i:(?=[A-Z]))?{_MONTH}\s+(?:the\s+)?$", re.IGNORECASE)
_MONTH_AFTER = re.compile(rf"\s*(?:of\s+)?(?=[A-Z])(?i:{_MONTH})")
_LABEL = re.compile(
    r"\b(?:scene|frame|question|step|figure|fig\.?|table|page|chapter|part|section|video|clip|image|picture|room|level|"
    r"round|season|episode|lesson|line|player|option|choice|phase|stage|case|example|q)\s*#?\s*$",
    re.IGNORECASE,
)

# ---- what stands between two numbers ----

_UNIT = r"(?:[^\W\d][\w/]*\s+){0,2}?"
_RANGE = re.compile(
    rf"\s*[%\u00b0]?\s*{_UNIT}(?:-+|~|\.{{2,}}|\bto\b|\bthrough\b|\buntil\b|\btill\b|\bup to\b|\bpast\b|\bby\b|\bversus\b|\bvs\b\.?"
    rf"|\band/or\b|\bor\b|\u5230|\u81f3|\u6216|\u6bd4)\s*(?:(?:maybe|perhaps|even|possibly|the|a|about)\s+)*",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"\b(?:between|from|either|both)\s+(?:the\s+)?$", re.IGNORECASE)
_AND = re.compile(rf"\s*[%\u00b0]?\s*{_UNIT}(?:and|&|or|to)\s+", re.IGNORECASE)
_OF = re.compile(rf"\s*{_UNIT}(?:out\s+)?(?:of|in|among|per|/)\s+(?:(?:the|these|those|all|its|every)\s+)?", re.IGNORECASE)
_NOTHING = re.compile(r"\s*\u00b0?\s*")

# ---- what concludes ----

_FIRM = re.compile(
    r"(?:\b(?:answer|final|conclude|conclusion|result)\b|\\boxed|=>|->|\u7b54\u6848|\u7b54\u3048|\uc815\ub2f5|\ub2f5)[^.;!?\n]*$",
    re.IGNORECASE,
)
_SOFT_CONCLUSION = re.compile(
    r"(?:\b(?:total(?:s|ling|ing)?|sum|count|altogether|overall|in all|so|thus|therefore|hence|which (?:is|makes|gives)|makes?|making"
    r"|gives?|giving|equals?|leaves|leaving)\b|\u603b\u5171|\u4e00\u5171|\u5171|\u6240\u4ee5|\u56e0\u6b64|\u5408\u8a08|\ucd1d)[^.;!?\n]*$",
    re.IGNORECASE,
)
_RESULT_IS = re.compile(r"\b(?:sum|total|product|difference|number|count)\b[^.;!?\n]* (?:is|are|was)\s+$", re.IGNORECASE)
_IN_TOTAL = re.compile(
    r"[ ,]*(?:[^\W\d]+ ){0,3}?(?:in total|in all|altogether|all together|total|overall|combined)\b(?!\s*[:=])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.;:!?]\s|[.;:!?]$|\n")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|either)\b", re.IGNORECASE)
_ROMAN = re.compile(r"(?:answer\s*(?:is|:)?\s*)?(?=[IVX]{2})(X{0,3})(IX|IV|V?I{0,3})\.?", re.ASCII)
_ROMAN_ONES = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")


def settled_number(text: str) -> Reading | None:
    """The number a text gives, understood or not; None when it gives none.

    The only one, the same one several times, the one in a box, or the one that the text concludes with ("3 red and 2
    blue, 5 in total"). With several of which none is concluded the reading has no value.
    """
    settled, readings = _settle(text)
    return settled or (replace(readings[0], value=None) if readings else None)


def last_number(text: str) -> Reading | None:
    """The number a text gives, else the last one in it."""
    settled, readings = _settle(text)
    return settled or (_strong(readings)[-1] if readings else None)


def _settle(text: str) -> tuple[Reading | None, list[Reading]]:
    """The number that a text settles on, if it does, and all its numbers."""
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    plain = plain_number_text(text)
    roman = _ROMAN.fullmatch(plain.strip())
    if roman:
        return Reading(10.0 * len(roman[1]) + _ROMAN_ONES.index(roman[2]), 0, len(plain)), []
    readings = read_numbers(plain)
    counted = _outside_parentheses(plain, _strong(readings))
    if counted and all(_is_same(counted[0], reading) for reading in counted):
        return counted[0], readings
    return (_concluded(plain, counted) or _emphasized(text)), readings


def _strong(readings: Sequence[Reading]) -> Sequence[Reading]:
    """The numbers that are meant as such, if there are any; else all."""
    return [reading for reading in readings if not reading.is_weak] or readings


def read_numbers(plain: str) -> list[Reading]:
    """The numbers of a plain text, in order, but those it denies; ranges and bounds have no value."""
    # 1. Two numbers that are one statement: a range, a choice, a share.
    joined: list[Reading] = []
    for reading in read_expressions(plain):
        if joined and _are_one(plain, joined[-1], reading):
            joined[-1] = Reading(None, joined[-1].start, reading.end)
        else:
            joined.append(reading)
    # 2. Each with what stands around it.
    readings = []
    for index, reading in enumerate(joined):
        before, after = _surroundings(plain, joined, index)
        if _DENIED.search(before) and not re.search(r"\bno\.\s*$", before, re.IGNORECASE):
            continue
        is_date = _MONTH_BEFORE.search(before) or _MONTH_AFTER.match(after)
        is_bounded = _BOUNDED_BEFORE.search(before) or _BOUNDED_AFTER.match(after)
        if is_bounded or is_date:
            reading = replace(reading, value=None)
        elif _LABEL.search(before):
            reading = replace(reading, is_weak=True)
        readings.append(reading)
    return readings


def _surroundings(plain: str, readings: Sequence[Reading], index: int) -> tuple[str, str]:
    """What stands right before and after a number, to the next number at most."""
    start, end = readings[index].start, readings[index].end
    before = readings[index - 1].end if index else 0
    after = readings[index + 1].start if index + 1 < len(readings) else len(plain)
    return plain[max(before, start - REACH) : start], plain[end : min(after, end + REACH)]


def _are_one(plain: str, first: Reading, second: Reading) -> bool:
    """Whether two neighbours make one statement that is no single number."""
    gap = plain[first.end : second.start]
    if len(gap) > REACH:
        return False
    is_same = _is_same(first, second)
    if _RANGE.fullmatch(gap) or _NOTHING.fullmatch(gap):
        return not is_same
    before = plain[max(0, first.start - REACH) : first.start]
    if _AND.fullmatch(gap) and _BETWEEN.search(before):
        return not is_same
    return _OF.fullmatch(gap) is not None


def _is_same(first: Reading, second: Reading) -> bool:
    if first.value is None or second.value is None:
        return False
    return math.isclose(first.value, second.value, rel_tol=1e-9)


def _outside_parentheses(plain: str, readings: Sequence[Reading]) -> list[Reading]:
    """Numbers that are no remark: of "5 (3 red and 2 blue)" the 5; of "5 (or 6)" and "(5)" all."""
    remarks: list[Reading] = []
    counted: list[Reading] = []
    opening, closing = -1, -1
    for reading in readings:
        if reading.start >= closing:
            opening = plain.rfind("(", max(0, reading.start - REACH), reading.start)
            closing = plain.find(")", reading.end, reading.end + REACH) if opening >= 0 else -1
            if opening >= 0 and ")" in plain[opening : reading.start]:
                closing = -1
        is_remark = closing >= 0 and counted and counted[0].start < opening
        if is_remark:
            content = plain[opening + 1 : closing]
            is_remark = content.strip() != plain[reading.start : reading.end] and not _HEDGE.search(content)
        (remarks if is_remark else counted).append(reading)
    return counted


def _concluded(plain: str, readings: Sequence[Reading]) -> Reading | None:
    """The last number that the text calls its answer, or total; a total that others follow in its sentence is none."""
    soft = None
    for index in range(len(readings) - 1, -1, -1):
        reading = readings[index]
        before, after = _surroundings(plain, readings, index)
        if _FIRM.search(before) or _IN_TOTAL.match(after):
            return reading
        is_last = index == len(readings) - 1 or _SENTENCE_END.search(plain[reading.end : readings[index + 1].start])
        statement = plain[max(0, reading.start - 2 * REACH) : reading.start]
        if soft is None and is_last and (_SOFT_CONCLUSION.search(before) or _RESULT_IS.search(statement)):
            soft = reading
    return soft


_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")


def _emphasized(text: str) -> Reading | None:
    """The number in bold letters, if there is but one."""
    bold = _BOLD.findall(end_of_text(text, MAX_NUMBER_CHARS))
    numbers = [reading for reading in map(settled_number, bold) if reading is not None and not reading.is_weak]
    return numbers[0] if len(numbers) == 1 else None
