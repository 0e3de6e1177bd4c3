"""Words around a number that say how it is meant: denied, bounded, one end of a range, a label, a conclusion.

English, and what Chinese, Japanese and Korean put right before or behind a number. Patterns named `_BEFORE` end at the
number, those named `_AFTER` begin behind it, and the others match all that stands between two numbers.
"""

from __future__ import annotations

import re


def _one_of(words: str) -> str:
    """A pattern of words apart by commas."""
    return "(?:" + "|".join(word.strip().replace(" ", r"\s+") for word in words.split(",")) + ")"


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


# ---- around one number ----

_DENIALS = _one_of(
    "not, cannot, never, no, nor, neither, without, anything but, all but, everything but, except, except for, "
    "other than, rather than, instead of, unlike"
)
_SOFTENERS = _one_of(
    "just, only, exactly, really, quite, the, a, an, single, equal to, about, simply, necessarily, number, be"
)
_DENIALS_CJK = _one_of("\u4e0d\u662f, \u5e76\u975e, \u800c\u975e")
DENIED_BEFORE = _pattern(rf"(?:(?:\b{_DENIALS}|n't)\s+(?:{_SOFTENERS}\s+){{0,3}}|(?:!=|{_DENIALS_CJK})\s*)$")
NUMBER_SIGN_BEFORE = _pattern(r"\bno\.\s*$")
"""No. 3 denies nothing."""

_MORE_OR_LESS = _one_of(
    "less, fewer, more, greater, larger, smaller, higher, lower, longer, shorter, bigger, older, younger, better, other"
)
_BOUNDS = _one_of(
    "at least, at most, up to, over, under, above, below, beyond, within, exceed, exceeds, exceeding, fewer, past, "
    "minimum, maximum, min, max, minimum of, maximum of, plus or minus"
)
_AS_MANY = rf"as\s+{_one_of('many, much, few, little, high, low, long')}\s+as"
_FUNCTIONS = rf"{_one_of('root, square, cube, logarithm, log, half, double, twice, triple, factorial')}\s+of"
_MULTIPLES = _one_of("twice, double, triple")
_BOUNDS_CJK = _one_of(
    "\u4e0d\u5230, \u5c11\u4e8e, \u591a\u4e8e, \u8d85\u8fc7, \u5927\u4e8e, \u5c0f\u4e8e, \u81f3\u5c11, \u6700\u591a, "
    "\u81f3\u591a, \u4e0d\u8d85\u8fc7, \u4e0d\u8db3, \u6700\u5c11"
)
BOUNDED_BEFORE = _pattern(
    rf"(?:\b(?:{_MORE_OR_LESS}\s+than(?:\s+or\s+equal\s+to)?|{_BOUNDS}|{_AS_MANY}|{_FUNCTIONS}|{_MULTIPLES})\s+"
    r"(?:(?:the|a|an|about|roughly)\s+){0,2}"
    rf"|(?:[<>]=?|\u00b1|\+/-|{_BOUNDS_CJK})\s*)$"
)
_BOUNDS_AFTER = _one_of(
    "or more, or less, or fewer, or greater, or above, or below, or over, or under, or higher, or lower, and above, "
    "and below, and over, and under, and up, at least, at most, minimum, maximum, plus"
)
_BOUNDS_AFTER_CJK = _one_of(
    "\u4ee5\u4e0a, \u4ee5\u4e0b, \u4ee5\u5185, \u672a\u6e80, \u672a\u6ee1, \uc774\uc0c1, \uc774\ud558, \ubbf8\ub9cc, "
    "\ucd08\uacfc"
)
BOUNDED_AFTER = _pattern(
    rf"\s+(?:[^\W\d]+\s+){{0,2}}?{_BOUNDS_AFTER}\b|\s*(?:\u00b1|\+/-|[<>]|\u2030)|\s*\S{{0,3}}?\s?{_BOUNDS_AFTER_CJK}"
)

_MONTHS = "(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)(?:uary|ruary|ch|il|ust|ember|tember|ober)?"
MONTH_BEFORE = re.compile(rf"\b{_MONTHS}\b\.?\s+(?:the\s+)?$")
MONTH_AFTER = re.compile(rf"\s*(?:of\s+)?\b{_MONTHS}\b")
LABEL_BEFORE = _pattern(
    r"\b"
    + _one_of(
        "scene, frame, question, step, figure, fig\\.?, table, page, chapter, part, section, video, clip, image, "
        "picture, room, level, round, season, episode, lesson, line, player, option, choice, phase, stage, case, "
        "example, q"
    )
    + r"\s*#?\s*$"
)

CUT_BEFORE = re.compile(r"\s*(?:[/^\\]|[-+]{2,})\s*")
CUT_AFTER = re.compile(r"\s*[-+*/^]+\s*")
"""Signs without their other side, all that the text has there."""

# ---- between two numbers ----

_UNIT = r"\s*[%\u00b0]?\s*(?:[^\W\d][\w/]*\s+){0,2}?"
_TO = _one_of("to, through, until, till, up to, past, by, versus, vs\\.?, and/or, or")
_TO_CJK = "[\u5230\u81f3\u6216\u6bd4]"
_MAYBE = r"(?:(?:maybe|perhaps|even|possibly|the|a|about)\s+)*"
RANGE = _pattern(rf"{_UNIT}(?:-+|~|\.{{2,}}|\b{_TO}(?!\w)|{_TO_CJK})\s*{_MAYBE}|\s*\u00b0?\s*")
"""Also nothing at all: "4 2"."""
PAIRED_BEFORE = _pattern(r"\b(?:between|from|either|both)\s+(?:the\s+)?$")
PAIRED = _pattern(rf"{_UNIT}(?:and|&|or|to)\s+")
_ALL = r"(?:(?:the|these|those|all|its|every)\s+)?"
SHARE = _pattern(rf"(?:{_UNIT}(?:out\s+)?of|\s*(?:in|among|per))\s+{_ALL}")
"""3 people out of the 5, 1 in 4."""

# ---- among several numbers ----

_REST = r"[^.;!?\n]*$"
"""Up to the number, within its sentence."""
_ANSWERS_CJK = _one_of("\u7b54\u6848, \u7b54\u3048, \uc815\ub2f5, \ub2f5")
ANSWER_BEFORE = _pattern(
    rf"(?:\b{_one_of('answer, final, conclude, conclusion, result')}\b|=>|->|{_ANSWERS_CJK}){_REST}"
)
_CONCLUSIONS = _one_of(
    "total, totals, totalling, totaling, sum, count, altogether, overall, in all, so, thus, therefore, hence, "
    "which is, makes, make, making, gives, give, giving, equals, equal, leaves, leaving"
)
_CONCLUSIONS_CJK = _one_of("\u603b\u5171, \u4e00\u5171, \u5171, \u6240\u4ee5, \u56e0\u6b64, \u5408\u8a08, \ucd1d")
CONCLUSION_BEFORE = _pattern(rf"(?:\b{_CONCLUSIONS}\b|{_CONCLUSIONS_CJK}){_REST}")
RESULT_BEFORE = _pattern(
    rf"\b{_one_of('sum, total, product, difference, number, count')}\b[^.;!?\n]* (?:is|are|was)\s+$"
)
TOTAL_AFTER = _pattern(
    rf"[ ,]*(?:[^\W\d]+ ){{0,3}}?{_one_of('in total, in all, altogether, all together, total, overall, combined')}\b"
    r"(?!\s*[:=])"
)
SENTENCE_END = re.compile(r"[.;:!?]\s|[.;:!?]$|\n")
HEDGE = _pattern(rf"\b{_one_of('or, maybe, perhaps, possibly, either')}\b")
