"""Which number a text gives: what denies a number, bounds it, makes a range of two, or concludes with one of many."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from longrl.rewards.number_contexts import (
    ANSWER_BEFORE,
    BOUNDED_AFTER,
    BOUNDED_BEFORE,
    CONCLUSION_BEFORE,
    CUT_AFTER,
    CUT_BEFORE,
    DENIED_BEFORE,
    HEDGE,
    LABEL_BEFORE,
    MONTH_AFTER,
    MONTH_BEFORE,
    NUMBER_SIGN_BEFORE,
    PAIRED,
    PAIRED_BEFORE,
    RANGE,
    RESULT_BEFORE,
    SENTENCE_END,
    SHARE,
    TOTAL_AFTER,
)
from longrl.rewards.number_expressions import Reading, read_expressions
from longrl.rewards.plain_numbers import MAX_NUMBER_CHARS, end_of_text, last_boxed, plain_number_text

REACH = 60
"""Characters before and after a number that can tell how it is meant."""

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
        if DENIED_BEFORE.search(before) and not NUMBER_SIGN_BEFORE.search(before):
            continue
        is_date = MONTH_BEFORE.search(before) or MONTH_AFTER.match(after)
        is_bounded = BOUNDED_BEFORE.search(before) or BOUNDED_AFTER.match(after)
        is_cut = CUT_BEFORE.fullmatch(before) or CUT_AFTER.fullmatch(after)
        if is_bounded or is_date or is_cut:
            reading = replace(reading, value=None)
        elif LABEL_BEFORE.search(before):
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
    if RANGE.fullmatch(gap):
        return not is_same
    before = plain[max(0, first.start - REACH) : first.start]
    if PAIRED.fullmatch(gap) and PAIRED_BEFORE.search(before):
        return not is_same
    return SHARE.fullmatch(gap) is not None


def _is_same(first: Reading, second: Reading) -> bool:
    if first.value is None or second.value is None:
        return False
    return math.isclose(first.value, second.value, rel_tol=1e-9)


def _outside_parentheses(plain: str, readings: Sequence[Reading]) -> list[Reading]:
    """Numbers that are no remark: of "5 (3 red and 2 blue)" the 5; of "5 (or 6)" and "(5)" all."""
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
            is_remark = content.strip() != plain[reading.start : reading.end] and not HEDGE.search(content)
        if not is_remark:
            counted.append(reading)
    return counted


def _concluded(plain: str, readings: Sequence[Reading]) -> Reading | None:
    """The last number that the text calls its answer, or total; a total that others follow in its sentence is none."""
    soft = None
    for index in range(len(readings) - 1, -1, -1):
        reading = readings[index]
        before, after = _surroundings(plain, readings, index)
        if ANSWER_BEFORE.search(before) or TOTAL_AFTER.match(after):
            return reading
        is_last = index == len(readings) - 1 or SENTENCE_END.search(plain[reading.end : readings[index + 1].start])
        statement = plain[max(0, reading.start - 2 * REACH) : reading.start]
        if soft is None and is_last and (CONCLUSION_BEFORE.search(before) or RESULT_BEFORE.search(statement)):
            soft = reading
    return soft


_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")


def _emphasized(text: str) -> Reading | None:
    """The number in bold letters, if there is but one."""
    bold = _BOLD.findall(end_of_text(text, MAX_NUMBER_CHARS))
    numbers = [reading for reading in map(settled_number, bold) if reading is not None and not reading.is_weak]
    return numbers[0] if len(numbers) == 1 else None
