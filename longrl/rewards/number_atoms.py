"""Single numbers with what is written onto them: "3k", "1 1/2", "5 thousand", "21st", "twenty-one"."""

from __future__ import annotations

import re
from dataclasses import replace

from longrl.rewards.cjk_numbers import read_cjk
from longrl.rewards.number_tokens import Term, TokenLine, has_decimal_comma, parse_numeral, word_set
from longrl.rewards.number_words import COUNTS, NUMBER_WORDS, ORDINALS, SCALES, Word, read_phrase

# ---- numerals ----

_MULTIPLIERS = {"k": 1e3, "K": 1e3, "M": 1e6, "mn": 1e6, "mln": 1e6, "B": 1e9, "bn": 1e9}
_ORDINAL_ENDINGS = frozenset(("st", "nd", "rd", "th"))
_UNITS = word_set(
    "s sec secs ms min mins h hr hrs d m cm mm km nm um in ft yd mi g kg mg lb lbs oz t L l mL ml cl dl N J kJ W kW MW "
    "V mV A mA Hz kHz MHz GHz C F Pa kPa MPa atm mol rad deg px fps mph kmh kph rpm dB GB MB KB kB TB am pm pcs pc pts "
    "p yo yr yrs wk wks x X ish cal kcal eV keV MeV \u03bcm \u03bcs \u03a9 USD EUR GBP CNY RMB"
)
"""What may be written right behind a numeral; other letters make a name of it: "12ab"."""
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_LONG_WORD = re.compile(r"[a-z]{4,}")
_UNIT_POWER = re.compile(r"(?:[kcmd]?m|in|ft|yd)[23]")


def read_numeral(line: TokenLine, index: int) -> Term:
    """The number that begins with the numeral at an index."""
    value, end = parse_numeral(line.text(index)), index + 1
    is_enclosed = line.text(index - 1) in _OPENING and line.text(end) in _CLOSING
    if value is None or (is_enclosed and has_decimal_comma(line.text(index))):  # (3,5) is a pair
        return Term(None, _name_end(line, end))
    period = end + (line.text(end) == ".")
    if _is_period(line, index, period):
        return Term(None, period + 3)
    if line.text(end) == ":" and line.kind(end + 1) == "numeral" and not _is_label(line, end):
        return _clock_or_ratio(line, end)
    if line.is_glued(end) and line.kind(end) in ("word", "name"):
        return _with_suffix(line, index, value)
    if line.is_glued(end) and line.kind(end) in ("cjk", "cjk_numeral"):
        return read_cjk(line, index) or Term(value, end)
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


def _is_period(line: TokenLine, index: int, opening: int) -> bool:
    """Whether digits in parentheses hang on a decimal fraction: 0.1(6), 3.(3)."""
    is_decimal = opening > index + 1 or "." in line.text(index)
    is_glued = all(map(line.is_glued, range(index + 1, opening + 3)))
    is_enclosed = line.text(opening) == "(" and line.kind(opening + 1) == "numeral" and line.text(opening + 2) == ")"
    return is_decimal and is_enclosed and is_glued


def _is_label(line: TokenLine, colon: int) -> bool:
    """Whether a colon stands behind a label: "Question 3: 5" is no ratio, "3:5" and "3 : 5" are."""
    return line.is_glued(colon) and not line.is_glued(colon + 1)


def _clock_or_ratio(line: TokenLine, index: int) -> Term:
    while line.text(index) == ":" and line.kind(index + 1) == "numeral":
        index += 2
    return Term(None, index)


def _with_suffix(line: TokenLine, index: int, value: float) -> Term:
    """A numeral with letters on it: "3k", "21st", "12cm", "25m2"; other names ("3x4", "12ab") are not understood."""
    suffix, end = line.text(index + 1), index + 2
    is_unit = suffix in _UNITS or _LONG_WORD.fullmatch(suffix) or _UNIT_POWER.fullmatch(suffix)
    if line.is_glued(end) and line.kind(end) in ("numeral", "name", "word"):
        return Term(None, _name_end(line, end))
    if suffix in _MULTIPLIERS:
        return Term(value * _MULTIPLIERS[suffix], end)
    if suffix.lower() in _ORDINAL_ENDINGS and value.is_integer():
        return Term(value, end, is_weak=True)
    if is_unit:
        term = _with_words(line, index + 1, value)
        return replace(term, end=max(term.end, end))
    return Term(None, end)


def _mixed_number(line: TokenLine, end: int, whole: float) -> Term | None:
    """A whole number and a fraction below one: "1 1/2", "2 and 3/4"."""
    start = end + (line.word(end) == "and" or line.text(end) == "&")
    if [line.kind(start), line.text(start + 1), line.kind(start + 2)] != ["numeral", "/", "numeral"]:
        return None
    numerator, denominator = parse_numeral(line.text(start)), parse_numeral(line.text(start + 2))
    if numerator is None or not denominator or not whole.is_integer() or not 0 < numerator < denominator:
        return Term(None, start + 3) if start == end else None
    return Term(whole + numerator / denominator, start + 3, is_compound=True)


def _with_words(line: TokenLine, end: int, value: float) -> Term:
    """A number with words behind it: "5 thousand", "3 and a half", "3 cups and a half"; a percent sign is noted."""
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
    """A number whose half stands behind the unit: "3 minutes and a half"."""
    unit = line.word(end)
    words, indices = word_run(line, end + 1)
    if not unit or unit in NUMBER_WORDS or words[:2] != ["and", "a"] or words[2:3] not in (["half"], ["quarter"]):
        return None
    return Term(value + (0.5 if words[2] == "half" else 0.25), indices[2] + 1)


# ---- words ----

_ZERO = frozenset(("nobody", "none"))
_NOT_NONE_OF = word_set("the these those above options answers choices")
_PRONOUN_BEFORE = word_set(
    "the this that these those which each every another other any some last next first right left only no"
)
_PRONOUN_AFTER = word_set("of who that which can could must may might should would cannot will sees")
_FEW = word_set("few several many some couple")
_OF_SECONDS = word_set("a per each every one another this that last next split")
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
    if word in ("no", "nothing", *_ZERO):
        return _read_zero(line, index)
    if word in ("a", "an") and line.word(index + 2) == "and":
        return _with_half(line, index + 1, 1.0)  # an hour and a half
    if word == "one" and before in ORDINALS:
        return None  # the first one
    is_unit = word == "second" and before in _OF_SECONDS
    if is_unit or word not in (*NUMBER_WORDS, "a", "an", "point", "single"):
        return None
    if word == "single":
        return Term(1.0, index + 1) if before == "a" and after != "one" else None
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
    if is_weak or not phrase.value.is_integer():
        return Term(phrase.value, end, is_weak=is_weak)
    return replace(_with_words(line, end, phrase.value), is_weak=False)


def _read_zero(line: TokenLine, index: int) -> Term | None:
    """Nobody, none, no one, no cats: 0; None where "no" is an answer or denies."""
    word, after = line.word(index), line.word(index + 1)
    if word in _ZERO:
        is_other = word == "none" and after == "of" and line.word(index + 2) in _NOT_NONE_OF
        return None if is_other else Term(0.0, index + 1, is_weak=True)
    if word == "nothing":
        return Term(0.0, index + 1, is_weak=True) if index == 0 and len(line.tokens) == 1 else None
    if after == "one":
        return Term(0.0, index + 2, is_weak=True)
    is_there = line.word(index - 1) in ("is", "are", "was", "were") and line.word(index - 2) == "there"
    is_plural = after.endswith("s") or after in ("people", "men", "women", "children")
    is_whole = index == 0 and is_plural and line.kind(index + 2) != "word"
    if not after or after in NUMBER_WORDS or not (is_there or is_whole):
        return None
    return Term(0.0, index + 2, is_weak=True)
