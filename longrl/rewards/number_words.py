"""English numbers in words.

A phrase is understood as a whole or not at all: "nineteen eighty-four" is neither 19 nor 84 here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
UNITS = {word: float(value) for value, word in enumerate(_ONES.split())} | {"nil": 0.0, "nought": 0.0}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10.0 * value for value, word in enumerate(_TENS.split(), start=2)} | {"fourty": 40.0}
SCALES = {"thousand": 1e3, "lakh": 1e5, "million": 1e6, "crore": 1e7, "billion": 1e9, "trillion": 1e12}
_ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth"
)
ORDINALS = {word: float(value) for value, word in enumerate(_ORDINALS.split())}
ORDINALS |= {word.replace("y", "ieth"): value for word, value in TENS.items()} | {"hundredth": 100.0, "thousandth": 1e3}
FRACTIONS = {word: value for word, value in ORDINALS.items() if value > 2} | {"half": 2.0, "quarter": 4.0}
"""Name of a part -> how many make a whole."""
PLURAL_FRACTIONS = {f"{word}s": value for word, value in FRACTIONS.items()} | {"halves": 2.0}
FREQUENCIES = {"once": 1.0, "twice": 2.0, "thrice": 3.0}
COUNTS = {"couple": 2.0, "pair": 2.0, "duo": 2.0, "trio": 3.0, "dozen": 12.0}
"""Names of a number of things, after "a"."""
VAGUE = frozenset(f"{word}s" for word in ("hundred", "dozen", "ten", *SCALES))
"""Of unknown size: "hundreds of people"."""
NUMBER_WORDS = frozenset(
    (*UNITS, *TENS, *SCALES, *ORDINALS, *FRACTIONS, *PLURAL_FRACTIONS, *FREQUENCIES, *COUNTS, *VAGUE, "hundred", "both")
)

Word = str | float
"""A word in lower case, or a number in digits within a phrase: 5 of "5 thousand"."""


@dataclass(frozen=True)
class Phrase:
    """A number in words, from the first of some words on."""

    value: float | None
    """None: words of numbers that are not understood together."""
    length: int
    """How many of the words it takes."""
    is_ordinal: bool = False


def read_phrase(words: Sequence[Word]) -> Phrase | None:
    """The number that words begin with, the longest one; None when they begin with none.

    Args:
        words: in lower case, hyphens taken for spaces; a number in digits may be the first.
    """
    if words and (words[0] in SCALES or words[0] == "hundred"):
        phrase = read_phrase(["a", *words])
        return phrase and Phrase(phrase.value, phrase.length - 1)
    phrase = _special(words) or _fraction(words) or _cardinal(words)
    if phrase is None:
        if words and words[0] in NUMBER_WORDS and words[0] not in FREQUENCIES:
            return Phrase(None, 1)
        return None
    is_cut = phrase.length < len(words) and _continues(words[phrase.length])
    if is_cut and not phrase.is_ordinal:
        length = next((n for n, word in enumerate(words) if not _continues(word)), len(words))
        return Phrase(None, max(length, phrase.length + 1))
    return phrase


def _continues(word: Word) -> bool:
    """Whether a word right behind a number says that the two are one number, and not one that is understood."""
    return isinstance(word, str) and (word in UNITS or word in TENS or word in SCALES or word in ("hundred", "dozen"))


def _special(words: Sequence[Word]) -> Phrase | None:
    """Words that are a number by themselves: ordinals, "twice", "a dozen", "half a million"."""
    first, second, third = (*words[:3], "", "", "")[:3]
    if first in ("a", "an") and second in COUNTS:
        return Phrase(COUNTS[str(second)], 2)
    if first == "half" and second in ("a", "an") and (third in SCALES or third == "dozen"):
        return Phrase({**SCALES, **COUNTS}[str(third)] / 2, 3)
    if first == "half" and second == "dozen":
        return Phrase(6.0, 2)
    if first in FREQUENCIES:
        return Phrase(FREQUENCIES[str(first)], 1)
    if first == "both":
        return Phrase(2.0, 1, is_ordinal=True)
    if first in TENS and second in ORDINALS and 0 < ORDINALS[str(second)] < 10:
        return Phrase(TENS[str(first)] + ORDINALS[str(second)], 2, is_ordinal=True)
    if first in ORDINALS:
        return Phrase(ORDINALS[str(first)], 1, is_ordinal=True)
    if first in COUNTS:
        return Phrase(COUNTS[str(first)], 1)
    return None


def _fraction(words: Sequence[Word]) -> Phrase | None:
    """Parts of one, with a whole number or without: "two thirds", "half", "two and a half", "half a million"."""
    part = _part(words)
    if part is not None:
        return part
    whole = _cardinal(words)
    if whole is None or whole.value is None or words[whole.length : whole.length + 1] != ["and"]:
        return None
    part = _part(words[whole.length + 1 :])
    if part is None or part.value is None or part.value >= 1:
        return None
    value, length = whole.value + part.value, whole.length + 1 + part.length
    scale = words[length] if length < len(words) else ""
    if scale in SCALES:
        return Phrase(value * SCALES[str(scale)], length + 1)
    return Phrase(value, length)


def _part(words: Sequence[Word]) -> Phrase | None:
    """A fraction below or above one without a whole number before it."""
    first, second = (*words[:2], "", "")[:2]
    if first == "half":
        return Phrase(0.5, 1)
    if first in ("a", "an", "one") and second in FRACTIONS:
        return Phrase(1 / FRACTIONS[str(second)], 2)
    numerator = _cardinal(words)
    if numerator is None or numerator.value is None or numerator.length >= len(words):
        return None
    name = words[numerator.length]
    if name in PLURAL_FRACTIONS:
        return Phrase(numerator.value / PLURAL_FRACTIONS[str(name)], numerator.length + 1)
    return None


def _cardinal(words: Sequence[Word]) -> Phrase | None:
    """A number that counts: "one hundred and five", "5 thousand", "two dozen", "three point one four"."""
    value, length = _whole(words)
    if length == 0 and words[:1] != ["point"]:
        return None
    decimals = []
    if words[length : length + 1] == ["point"]:
        for word in words[length + 1 :]:
            if word not in UNITS or UNITS[str(word)] > 9:
                break
            decimals.append(str(int(UNITS[str(word)])))
    if decimals:
        value += float("0." + "".join(decimals))
        length += 1 + len(decimals)
    elif length == 0:
        return None
    factor = words[length] if length < len(words) else ""
    if factor == "dozen" or (decimals and factor in SCALES):
        return Phrase(value * {**SCALES, **COUNTS}[str(factor)], length + 1)
    return Phrase(value, length)


def _whole(words: Sequence[Word]) -> tuple[float, int]:
    """A whole number in words, and how many of them it takes; 0 words where there is none."""
    total, length, scale = 0.0, 0, math.inf
    while length < len(words):
        start = length + 1 if length and words[length] == "and" else length
        value, used = _below_thousand(words[start:])
        if not used:
            break
        end = start + used
        name = words[end] if end < len(words) else ""
        own_scale = SCALES.get(str(name), 1.0)
        if own_scale >= scale or (isinstance(words[start], float) and start > 0) or value >= scale:
            break
        total += value * own_scale
        length, scale = end + (own_scale > 1), own_scale
        if scale == 1:
            break
    return total, length


def _below_thousand(words: Sequence[Word]) -> tuple[float, int]:
    """The part of a number before its next scale, and its words: "five", "a hundred", "three hundred and forty-two"."""
    first = words[0] if words else ""
    second = words[1] if len(words) > 1 else ""
    if isinstance(first, float):
        value, length = first, 1
    elif first in ("a", "an") and (second in SCALES or second == "hundred"):
        value, length = 1.0, 1
    else:
        value, length = _below_hundred(words)
    if not length or words[length : length + 1] != ["hundred"]:
        return value, length
    value, length = value * 100, length + 1
    start = length + 1 if words[length : length + 1] == ["and"] else length
    rest, used = _below_hundred(words[start:])
    return (value + rest, start + used) if used else (value, length)


def _below_hundred(words: Sequence[Word]) -> tuple[float, int]:
    first = str(words[0]) if words else ""
    if first in UNITS:
        return UNITS[first], 1
    if first not in TENS:
        return 0.0, 0
    second = str(words[1]) if len(words) > 1 else ""
    if 1 <= UNITS.get(second, 0) <= 9:
        return TENS[first] + UNITS[second], 2
    return TENS[first], 1
