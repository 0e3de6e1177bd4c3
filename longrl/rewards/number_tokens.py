"""What a text with numbers consists of: numerals, words, names with digits, Chinese characters and signs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from longrl.rewards.number_words import NUMBER_WORDS

Kind = Literal["numeral", "word", "name", "cjk_numeral", "cjk", "command", "sign"]


def word_set(words: str) -> frozenset[str]:
    """Words apart by spaces, as a set."""
    return frozenset(words.split())


class Token(NamedTuple):
    """A part of a text without space in it, except between groups of thousands."""

    kind: Kind
    text: str
    start: int
    end: int


CJK_DIGITS = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u3007\u58f9\u4e24"
"""Chinese characters for 0 to 9, then other ones for 0, 1 and 2."""
CJK_PLACES = {"\u5341": 10.0, "\u767e": 100.0, "\u5343": 1000.0, "\ubc31": 100.0, "\ucc9c": 1000.0}
CJK_MYRIADS = {"\u4e07": 1e4, "\u842c": 1e4, "\u4ebf": 1e8, "\u5104": 1e8, "\ub9cc": 1e4, "\uc5b5": 1e8}
LATIN = "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f"
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_CJK_NUMERAL = f"[{CJK_DIGITS}{''.join((*CJK_PLACES, *CJK_MYRIADS))}]"
_CURRENCY = r"(?:USD|EUR|GBP|INR|CNY|RMB|JPY|HKD|Rs\.?|RM)(?=\d)"
_TOKEN = re.compile(
    rf"(?P<currency>(?<![{LATIN}]){_CURRENCY})"
    rf"|(?P<name>(?!(?:to|or|and|by|plus|minus|negative|of|is|than|about)-)[{LATIN}]+[-_]?\d\w*(?:\.\d+)*)"
    r"|(?P<numeral>"
    r"\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?"  # 1 234 567
    rf"|\d+(?:[.,'_]\d+)*(?:[eE][+-]?\d+(?![\d.]*[{LATIN}]))?"
    r"|(?<![\w.])\.\d+"
    r")"
    rf"|(?P<word>[{LATIN}]+(?:'[{LATIN}]+)*)"
    rf"|(?P<cjk_numeral>{_CJK_NUMERAL}+)"
    rf"|(?P<cjk>(?:(?!{_CJK_NUMERAL})[{CJK}])+)"
    r"|(?P<command>\\[A-Za-z]+|\\.)"
    r"|(?P<sign>\*\*|!=|<=|>=|=>|->|\+/-|\.{2,}|\S)"
)


def tokenize(text: str) -> list[Token]:
    """The tokens of a text in its plain spelling (`longrl.rewards.plain_numbers`)."""
    tokens = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind != "currency":
            tokens.append(Token(kind, match[0], match.start(), match.end()))  # type: ignore[arg-type]
    return tokens


@dataclass(frozen=True)
class Term:
    """A number of a line of tokens, or a part of an expression."""

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


@dataclass(frozen=True)
class TokenLine:
    """Tokens by index; beyond the ends everything is ""."""

    tokens: Sequence[Token]

    @cached_property
    def has_words(self) -> bool:
        """Whether there is more than numbers and signs."""
        return any(token.kind in ("word", "cjk") for token in self.tokens)

    def text(self, index: int) -> str:
        """Text of a token."""
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ""

    def kind(self, index: int) -> str:
        """Its kind."""
        return self.tokens[index].kind if 0 <= index < len(self.tokens) else ""

    def word(self, index: int) -> str:
        """A word in lower case; "" where there is none."""
        return self.text(index).lower() if self.kind(index) == "word" else ""

    def is_glued(self, index: int) -> bool:
        """Whether no space parts a token from the one before it."""
        return 0 < index < len(self.tokens) and self.tokens[index].start == self.tokens[index - 1].end

    def skip_unit(self, index: int) -> int:
        """Index behind a unit or a few words: of "m/s^2", "km/h", "red balls" or "%"; the same index without any."""
        if self.text(index) == "^" and self.kind(index - 1) == "word":  # 7cm^2
            index = self.skip_exponent(index)
        for num_words in range(MAX_UNIT_WORDS):
            index = self._skip_mark(index)
            is_joined = self.text(index) in ("/", "*", "-") and (num_words > 0 or self.is_glued(index))
            start = index + is_joined
            word = self.word(start)
            is_unit = word and word not in NO_UNIT and word not in NUMBER_WORDS
            if not is_unit and self.kind(start) not in ("name", "cjk"):
                break
            index = start + 1
            if self.text(index) == "^":
                index = self.skip_exponent(index)
        return index

    def _skip_mark(self, index: int) -> int:
        """Index behind signs of percent, degrees and feet, a space of LaTeX, and the point of an abbreviated unit."""
        while self.text(index) in ("%", "\u00b0", "'"):
            index += 1
        is_space = self.text(index) == "~" and self.kind(index + 1) == "word"
        is_point = self.text(index) == "." and self.is_glued(index) and self.text(index + 1) in ("=", "+")
        return index + (is_space or is_point)

    def skip_exponent(self, index: int) -> int:
        """Index behind "^2", "^{2}" or "^-2" that no number is raised to."""
        index += 1
        while self.text(index) in ("{", "(", "-", "+"):
            index += 1
        index += self.kind(index) in ("numeral", "word", "name")
        return index + (self.text(index) in ("}", ")"))


MAX_UNIT_WORDS = 4
NO_UNIT = word_set(
    "and or to of out in is are was were equals equal makes make gives give plus minus times divided x by than more "
    "less fewer not but so total until till through between from with a an the squared cubed pi"
)
"""Words that are not what a number counts."""

# ---- numerals ----

_GROUPED = re.compile(r"[1-9]\d{0,2}(?P<separator>[,. '_])\d{3}(?:(?P=separator)\d{3})*")
_LAKHS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}")


def has_decimal_comma(text: str) -> bool:
    """Whether the last comma of a numeral is no separator of thousands: "3,5", "1.234,5"."""
    return "," in text and not _GROUPED.fullmatch(text.partition(".")[0]) and not _LAKHS.fullmatch(text)


def parse_numeral(text: str) -> float | None:
    """The value of digits with separators; None when they are no one number.

    A point or comma that comes once and is not before exactly three digits is the decimal one, and so is a point that
    comes once at all: "1,234" is 1234, "1.234" is 1.234, "3,5" is 3.5 and "0,125" is 0.125. Thousands may be parted by
    commas, points, spaces, apostrophes or underscores, lakhs by commas: "1.234,5", "1'234", "12,34,567".

    Example:
        "1,2,3" and "1.2.3" are None.
    """
    text, _, exponent = text.lower().partition("e")
    whole, decimals = text, ""
    last = max(text.rfind("."), text.rfind(","))
    if last >= 0:
        mark = text[last]
        others = set(text[:last]) - set("0123456789")
        is_grouped = _GROUPED.fullmatch(text) is not None or _LAKHS.fullmatch(text) is not None
        if text.count(mark) == 1 and (others or mark == "." or not is_grouped) and mark not in others:
            whole, decimals = text[:last], text[last + 1 :]
    if _GROUPED.fullmatch(whole) or _LAKHS.fullmatch(whole):
        whole = re.sub(r"[^\d]", "", whole)
    if not re.fullmatch(r"\d*", whole) or not (whole or decimals):
        return None
    return float(f"{whole or 0}.{decimals or 0}e{exponent or 0}")
