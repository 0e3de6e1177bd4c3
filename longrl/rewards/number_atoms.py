"""Single numbers with what is written onto them: "3k", "1 1/2", "5 thousand", "21st", "twenty-one", numerals of Chinese."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from longrl.rewards.number_tokens import THOUSANDS, TokenLine, parse_numeral
from longrl.rewards.number_words import (
    CJK_DIGITS,
    CJK_WORDS,
    COUNTS,
    NUMBER_WORDS,
    ORDINALS,
    SCALES,
    Word,
    read_cjk_numeral,
    read_phrase,
)


@dataclass(frozen=True)
class Term:
    """A number, or a part of an expression."""

    value: float | None
    """None: there is a number, but it is not understood."""
    end: int
    """Index of the token behind it."""
    is_weak: bool = False
    """A word that may be meant as a number or not: "first", "the one", "both"."""
    is_percent: bool = False
    is_compound: bool = False
    """Worked out from several numbers."""
    is_doubtful: bool = False
    """No calculation unless "=" follows: "40-42", "3 x 4"."""


# ---- numerals ----

_MULTIPLIERS = {"k": 1e3, "K": 1e3, "M": 1e6, "mn": 1e6, "mln": 1e6, "B": 1e9, "bn": 1e9}
_ORDINAL_ENDINGS = frozenset(("st", "nd", "rd", "th"))
_UNITS = frozenset(
    "s sec secs ms min mins h hr hrs d m cm mm km nm um in ft yd mi g kg mg lb lbs oz t L l mL ml cl dl N J kJ W kW MW V "
    "mV A mA Hz kHz MHz GHz C F Pa kPa MPa atm mol rad deg px fps mph kmh kph rpm dB GB MB KB kB TB am pm pcs pc pts p yo "
    "yr yrs wk wks x X ish cal kcal eV keV MeV \u03bcm \u03bcs \u03a9 USD EUR GBP CNY RMB".split()
)
"""What may be written right behind a numeral; other letters make a name of it: "12ab"."""
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
"""Of pairs: "(3,5)" is none 3.5."""
_LONG_WORD = re.compile(r"[a-z]{4,}")
_UNIT_POWER = re.compile(r"(?:[kcmd]?m|in|ft|yd)[23]")


def read_numeral(line: TokenLine, index: int) -> Term:
    """The number that begins with the numeral at an index."""
    value, end = parse_numeral(line.text(index)), index + 1
    is_pair = "," in line.text(index) and line.text(index - 1) in _OPENING and line.text(end) in _CLOSING
    if value is None or (is_pair and not THOUSANDS.fullmatch(line.text(index))):
        return Term(None, _name_end(line, end))
    if line.text(end) == ":" and line.kind(end + 1) == "numeral" and not _is_label(line, end):
        return _clock_or_ratio(line, end)
    if line.is_glued(end) and line.kind(end) in ("word", "name"):
        return _with_suffix(line, index, value)
    if line.is_glued(end) and line.kind(end) in ("cjk", "cjk_numeral"):
        return read_cjk(line, index)
    if line.text(end) == "!" and line.is_glued(end):
        return Term(value if line.has_words else None, end + 1)
    mixed = _mixed_number(line, end, value)
    if mixed is not None:
        return mixed
    return _with_words(line, end, value)


def _name_end(line: TokenLine, index: int) -> int:
    """Index behind all that is written onto what came before."""
    while line.is_glued(index) and line.kind(index) in ("word", "name", "numeral", "cjk_numeral"):
        index += 1
    return index


def _is_label(line: TokenLine, colon: int) -> bool:
    """ "Question 3: 5" is no ratio; "3:5" and "3 : 5" are."""
    return line.is_glued(colon) and not line.is_glued(colon + 1)


def _clock_or_ratio(line: TokenLine, index: int) -> Term:
    while line.text(index) == ":" and line.kind(index + 1) == "numeral":
        index += 2
    return Term(None, index)


def _with_suffix(line: TokenLine, index: int, value: float) -> Term:
    """ "3k", "21st", "12cm", "25m2"; of other names ("3x4", "12ab") nothing is known."""
    suffix, end = line.text(index + 1), index + 2
    is_unit = suffix in _UNITS or _LONG_WORD.fullmatch(suffix) or _UNIT_POWER.fullmatch(suffix)
    if line.is_glued(end) and line.kind(end) in ("numeral", "name", "word"):
        return Term(None, _name_end(line, end))
    if suffix in _MULTIPLIERS:
        return Term(value * _MULTIPLIERS[suffix], end)
    if suffix.lower() in _ORDINAL_ENDINGS and value == int(value):
        return Term(value, end, is_weak=True)
    if is_unit:
        term = _with_words(line, index + 1, value)
        return replace(term, end=max(term.end, end))
    return Term(None, end)


def _mixed_number(line: TokenLine, end: int, whole: float) -> Term | None:
    """ "1 1/2" and "2 and 3/4", whose fraction must be below one."""
    start = end + (line.word(end) == "and" or line.text(end) == "&")
    if [line.kind(start), line.text(start + 1), line.kind(start + 2)] != ["numeral", "/", "numeral"]:
        return None
    numerator, denominator = parse_numeral(line.text(start)), parse_numeral(line.text(start + 2))
    if numerator is None or not denominator or whole != int(whole) or not 0 < numerator < denominator:
        return Term(None, start + 3) if start == end else None
    return Term(whole + numerator / denominator, start + 3, is_compound=True)


def _with_words(line: TokenLine, end: int, value: float) -> Term:
    """ "5 thousand", "3 and a half", "3 cups and a half"; a percent sign is noted."""
    words, indices = word_run(line, end)
    is_magnitude = bool(words) and (words[0] in SCALES or words[0] in ("hundred", "dozen"))
    if is_magnitude or words[:1] == ["and"]:
        phrase = read_phrase([value, *words])
        if phrase is not None and phrase.length > 1:
            return Term(phrase.value, indices[phrase.length - 2] + 1)
    term = _with_half(line, end, value)
    if term is not None:
        return term
    is_percent = line.text(end) == "%" or line.word(end) in ("percent", "pct")
    is_percent |= line.word(end) == "per" and line.word(end + 1) == "cent"
    return Term(value, end, is_percent=is_percent)


def _with_half(line: TokenLine, end: int, value: float) -> Term | None:
    """ "3 minutes and a half": the unit stands between."""
    unit = line.word(end)
    words, indices = word_run(line, end + 1)
    if not unit or unit in NUMBER_WORDS or words[:2] != ["and", "a"] or words[2:3] not in (["half"], ["quarter"]):
        return None
    return Term(value + (0.5 if words[2] == "half" else 0.25), indices[2] + 1)


# ---- words ----

_ZERO = frozenset(("nobody", "none"))
_NOT_NONE_OF = frozenset("the these those above options answers choices".split())
_PRONOUN_BEFORE = frozenset(
    "the this that these those which each every another other any some last next first right left only no".split()
)
_PRONOUN_AFTER = frozenset("of who that which can could must may might should would cannot will sees".split())
_FEW = frozenset("few several many some couple".split())
_OF_SECONDS = frozenset("a per each every one another this that last next split".split())
MAX_PHRASE_WORDS = 24


def word_run(line: TokenLine, index: int) -> tuple[list[Word], list[int]]:
    """Words in lower case from an index on, hyphens between them taken for spaces, and the indices of their tokens."""
    words: list[Word] = []
    indices: list[int] = []
    while len(words) < MAX_PHRASE_WORDS:
        if words and line.text(index) == "-" and line.is_glued(index) and line.is_glued(index + 1):
            index += 1
        if not line.word(index):
            break
        words.append(line.word(index))
        indices.append(index)
        index += 1
    return words, indices


def read_words(line: TokenLine, index: int) -> Term | None:
    """The number in words that begins at an index; None when none does."""
    word, before, after = line.word(index), line.word(index - 1), line.word(index + 1)
    if word in ("no", *_ZERO):
        return _read_zero(line, index)
    if word in ("a", "an") and line.word(index + 2) == "and":
        return _with_half(line, index + 1, 1.0)  # an hour and a half
    if word == "one" and before in ORDINALS:
        return None  # the first one
    if word == "second" and before in _OF_SECONDS or word not in (*NUMBER_WORDS, "a", "an", "point", "single"):
        return None
    if word == "single":
        return Term(1.0, index + 1) if before == "a" else None
    words, indices = word_run(line, index)
    phrase = read_phrase(words)
    if phrase is None:
        return None
    end = indices[phrase.length - 1] + 1
    if phrase.value is None or (before in _FEW and (word == "hundred" or word in SCALES)):
        return Term(None, end)
    is_pronoun = word == "one" and phrase.length == 1 and (before in _PRONOUN_BEFORE or after in _PRONOUN_AFTER)
    is_pair = word in COUNTS and word != "dozen"
    is_weak = phrase.is_ordinal or is_pronoun or is_pair or word == "once"
    if is_weak or phrase.value != int(phrase.value):
        return Term(phrase.value, end, is_weak=is_weak)
    return replace(_with_words(line, end, phrase.value), is_weak=False)


def _read_zero(line: TokenLine, index: int) -> Term | None:
    """ "nobody", "none", "no one", "no cats" and "there are no cats"; None where "no" is an answer or denies."""
    word, after = line.word(index), line.word(index + 1)
    if word in _ZERO:
        is_other = word == "none" and after == "of" and line.word(index + 2) in _NOT_NONE_OF
        return None if is_other else Term(0.0, index + 1, is_weak=True)
    if after == "one":
        return Term(0.0, index + 2, is_weak=True)
    is_there = line.word(index - 1) in ("is", "are", "was", "were") and line.word(index - 2) == "there"
    is_plural = after.endswith("s") or after in ("people", "men", "women", "children")
    is_whole = index == 0 and is_plural and line.kind(index + 2) != "word"
    if not after or after in NUMBER_WORDS or not (is_there or is_whole):
        return None
    return Term(0.0, index + 2, is_weak=True)


# ---- Chinese, Japanese, Korean ----

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
_VAGUE_AFTER = re.compile("[\u591a\u4f59\u9918\u51e0\u5e7e]")
_NOBODY = ("\u6ca1\u6709", "\u6ca1\u6709\u4eba", "\u6ca1\u4eba")
_POINT = ("\u70b9", "\u9ede")
_PARTS = "\u5206\u4e4b"
_HUNDREDTHS = "\u767e"
_HALF = re.compile("(?!\u70b9|\u9ede|\u6642|\u65f6).?\u534a")
_CJK_PLAIN = re.compile(rf"[{CJK_DIGITS}\u5341]")


def read_cjk(line: TokenLine, index: int) -> Term | None:
    """A number with characters of Chinese, Japanese or Korean at an index; None where they are parts of other words."""
    before = line.text(index - 1) if line.is_glued(index) else ""
    if line.text(index) in CJK_WORDS:
        return Term(float(CJK_WORDS[line.text(index)]), index + 1)
    if line.text(index) in _NOBODY:
        return Term(0.0, index + 1, is_weak=True)
    if line.text(index).startswith("\u534a"):  # half
        return None if before else Term(0.5, index + 1)
    if line.kind(index) == "cjk":
        return None
    end = index
    while line.kind(end) in ("numeral", "cjk_numeral") and (end == index or line.is_glued(end)):
        end += 1
    run = line.tokens[index:end]
    text = "".join(token.text for token in run)
    numeral = parse_numeral(text) if end == index + 1 and run[0].kind == "numeral" else read_cjk_numeral(text)
    after = line.text(end) if line.is_glued(end) and line.kind(end) == "cjk" else ""
    in_digits = run[0].kind == "numeral"
    if not in_digits and not _stands_alone(line, index, text, before, after):
        return None
    if _VAGUE_BEFORE.search(before) or _VAGUE_AFTER.match(after):
        return Term(None, end)
    term = _cjk_fraction(line, index, end, text, numeral) or Term(numeral, end)
    half = _HALF.match(after)
    if term.end == end and half and numeral is not None:
        is_whole = half[0] != "\u534a"  # "one and a half" has a classifier between, "one half" has none
        value = numeral + 0.5 if is_whole else 0.5 if numeral == 1 else None
        term = Term(value, end + 1)
    return term


def _stands_alone(line: TokenLine, index: int, text: str, before: str, after: str) -> bool:
    """Whether Chinese characters are a numeral, and not a part of a word."""
    if _NO_NUMERAL_BEFORE.search(before) or not _CJK_PLAIN.search(text + "\u5341" * (text == _HUNDREDTHS)):
        return False
    if text == "\u5341" and after.startswith("\u5206"):
        return len(after) > 1  # "very" without a unit behind it
    return not after or after[0] in _CLASSIFIERS or after.startswith(_PARTS) or _VAGUE_AFTER.match(after) is not None


def _cjk_fraction(line: TokenLine, index: int, end: int, text: str, numeral: float | None) -> Term | None:
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
