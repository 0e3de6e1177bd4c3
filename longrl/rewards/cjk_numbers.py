"""Numbers in the characters of Chinese, Japanese and Korean, alone, behind digits or among other characters."""

from __future__ import annotations

import math
import re

from longrl.rewards.number_tokens import CJK_DIGITS, CJK_MYRIADS, CJK_PLACES, Term, TokenLine, parse_numeral

# ---- numerals ----

_DIGITS = {character: float(value % 10) for value, character in enumerate(CJK_DIGITS)}
_CJK_ITEM = re.compile(r"\d+(?:\.\d+)?|\D")
CJK_WORDS = {
    "\ud558\ub098": 1, "\ub458": 2, "\uc14b": 3, "\ub137": 4, "\ub2e4\uc12f": 5, "\uc5ec\uc12f": 6, "\uc77c\uacf1": 7,
    "\uc5ec\ub35f": 8, "\uc544\ud649": 9, "\uc5f4": 10, "\ud55c": 1, "\ub450": 2, "\uc138": 3, "\ub124": 4,
    "\u3072\u3068\u3064": 1, "\u3075\u305f\u3064": 2, "\u307f\u3063\u3064": 3, "\u3088\u3063\u3064": 4,
    "\u3044\u3064\u3064": 5, "\u3080\u3063\u3064": 6, "\u306a\u306a\u3064": 7, "\u3084\u3063\u3064": 8,
    "\u3053\u3053\u306e\u3064": 9, "\u4fe9": 2, "\u4ee8": 3,
}  # fmt: skip
"""Korean and Japanese words for one to ten, and Chinese ones for "the two" and "the three"."""


def read_cjk_numeral(text: str) -> float | None:
    """The value of a numeral of Chinese characters, digits or both: "3\u4e075\u5343" is 35,000; None if it is none."""
    items = _CJK_ITEM.findall(text)
    if len(items) > 1 and all(item in _DIGITS for item in items):
        # Digit by digit, as years are; "\u4e09\u56db" in a row is "three or four".
        return None if len(items) < 4 else float("".join(str(int(_DIGITS[item])) for item in items))
    total, section, digit = 0.0, 0.0, None
    place = myriad = math.inf
    for item in items:
        if item in _DIGITS or item[0].isdigit():
            if digit not in (None, 0.0):
                return None
            digit = _DIGITS[item] if item in _DIGITS else float(item)
        elif item in CJK_PLACES and CJK_PLACES[item] < place:
            place = CJK_PLACES[item]
            section, digit = section + (1.0 if digit is None else digit) * place, None
        elif item in CJK_MYRIADS and CJK_MYRIADS[item] < myriad and (section or digit):
            myriad = CJK_MYRIADS[item]
            total, section, digit, place = total + (section + (digit or 0.0)) * myriad, 0.0, None, math.inf
        else:
            return None
    return total + section + (digit or 0.0)


# ---- in a text ----

_CLASSIFIERS = frozenset(
    "\u4e2a\u500b\u540d\u4eba\u4f4d\u53ea\u96bb\u6b21\u5f20\u5f35\u6761\u689d\u672c\u8f86\u8f1b\u53f0\u4ef6\u9897\u9846"
    "\u5757\u584a\u676f\u74f6\u7897\u76d8\u76e4\u76d2\u5305\u888b\u53cc\u96d9\u5bf9\u5c0d\u5c81\u6b72\u5e74\u6708\u65e5"
    "\u5929\u5c0f\u65f6\u6642\u5206\u79d2\u7c73\u5398\u516c\u91cc\u5143\u6bdb\u7f8e\u5ea6\u5c42\u5c64\u697c\u6a13"
    "\u9875\u9801\u884c\u6392\u7ec4\u7d44\u7fa4\u961f\u968a\u5bb6\u95f4\u9593\u6240\u5ea7\u67b6\u8258\u68f5\u6735\u6839"
    "\u652f\u628a\u9762\u5e45\u9996\u53e5\u6bb5\u7ae0\u7bc0\u8282\u79cd\u7a2e\u7c7b\u6b65\u56de\u904d\u573a\u5834\u8f6e"
    "\u5708\u500d\u6210\u3064\u5339\u982d\u5934\u518a\u679a\u756a\u76ee\u70b9\u9ede\u534a\u7b46\u7b14\u9053\u53e3\u904e"
    "\u4efd\u9879\u9805\u7247\u8f2a\u684c\u7ad9\u3067\u306e\u3001\uc758"
)
"""Characters that count things: a numeral of Chinese before another one is a part of a word ("altogether")."""
_NO_NUMERAL_BEFORE = re.compile("[\u7edf\u7d71\u552f\u4e4b\u540c\u4e13\u5355\u51e0\u5e7e]$")
_VAGUE_BEFORE = re.compile("[\u51e0\u5e7e\u6570\u6578]$")
_VAGUE_AFTER = re.compile(".?[\u591a\u4f59\u9918\u51e0\u5e7e]")
_CONNECTIVES = "\u5230\u81f3\u6216\u548c\u4e0e\u52a0\u6bd4\u662f"
_NOBODY = ("\u6ca1\u6709", "\u6ca1\u6709\u4eba", "\u6ca1\u4eba")
_POINT = ("\u70b9", "\u9ede")
_PARTS = "\u5206\u4e4b"
_HUNDREDTHS = "\u767e"
_HALVED = "\u534a"
_HALF = re.compile("(?!\u70b9|\u9ede|\u6642|\u65f6).?\u534a")
_CJK_PLAIN = re.compile(rf"[{CJK_DIGITS}\u5341]")


def read_cjk(line: TokenLine, index: int) -> Term | None:
    """A number with characters of Chinese, Japanese or Korean at an index; None where they are parts of other words."""
    before = line.text(index - 1) if line.is_glued(index) else ""
    if line.kind(index) == "cjk":
        return _read_word(line.text(index), before, index + 1)
    # 1. The numeral, of digits and Chinese characters in a row.
    end = index
    while line.kind(end) in ("numeral", "cjk_numeral") and (end == index or line.is_glued(end)):
        end += 1
    run = line.tokens[index:end]
    text = "".join(token.text for token in run)
    in_digits = line.kind(index) == "numeral"
    numeral = parse_numeral(text) if in_digits and len(run) == 1 else read_cjk_numeral(text)
    # 2. Whether it is one: characters are parts of words too, and numbers may be vague.
    after = line.text(end) if line.is_glued(end) and line.kind(end) == "cjk" else ""
    if not in_digits and not _stands_alone(text, before, after):
        return None
    if _VAGUE_BEFORE.search(before) or _VAGUE_AFTER.match(after):
        return Term(None, end)
    # 3. What comes behind it.
    return _cjk_fraction(line, end, text, numeral) or _with_half(numeral, after, end) or Term(numeral, end)


def _read_word(word: str, before: str, end: int) -> Term | None:
    """Words that are a number: one to ten in Korean and Japanese, nobody, half."""
    if word in CJK_WORDS:
        return Term(float(CJK_WORDS[word]), end, is_weak=True)
    if word in _NOBODY:
        return Term(0.0, end, is_weak=True)
    if word.startswith(_HALVED) and not before:
        return Term(0.5, end)
    return None


def _with_half(numeral: float | None, after: str, end: int) -> Term | None:
    """A numeral and a half: a classifier stands between, and without one "one half" is 0.5."""
    half = _HALF.match(after)
    if half is None or numeral is None:
        return None
    if half[0] != _HALVED:
        return Term(numeral + 0.5, end + 1)
    return Term(0.5 if numeral == 1 else None, end + 1)


def _stands_alone(text: str, before: str, after: str) -> bool:
    """Whether Chinese characters are a numeral, and not a part of a word."""
    if _NO_NUMERAL_BEFORE.search(before) or not _CJK_PLAIN.search(text + "\u5341" * (text == _HUNDREDTHS)):
        return False
    if text == "\u5341" and after.startswith("\u5206"):
        return len(after) > 1  # "very" without a unit behind it
    return (
        not after
        or after[0] in _CLASSIFIERS
        or after[0] in _CONNECTIVES
        or after.startswith(_PARTS)
        or _VAGUE_AFTER.match(after) is not None
    )


def _cjk_fraction(line: TokenLine, end: int, text: str, numeral: float | None) -> Term | None:
    """A decimal fraction, or "two of three parts" for 2/3; None where there is none."""
    sign = line.text(end)
    if line.kind(end + 1) not in ("numeral", "cjk_numeral") or not line.is_glued(end + 1):
        return None
    follower = line.text(end + 1)
    if sign in _POINT and numeral is not None and all(character in CJK_DIGITS for character in follower):
        decimals = "".join(str(CJK_DIGITS.index(character) % 10) for character in follower)
        return Term(float(f"{numeral:.0f}.{decimals}"), end + 2)
    if sign != _PARTS:
        return None
    numerator = read_cjk_numeral(follower)
    if text == _HUNDREDTHS:
        return Term(numerator, end + 2, is_percent=True)
    if numerator is None or not numeral or math.isinf(numeral):
        return Term(None, end + 2)
    return Term(numerator / numeral, end + 2)
