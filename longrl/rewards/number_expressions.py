r"""Numbers of a text with their signs, powers and fractions, and what equations work out to.

What is found is understood or not: a `Reading` without a value stands where there is a number that cannot be read for
certain ("40-42", "3 x 4", "1:30", "5!"), so that nobody takes a part of it for the whole.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from longrl.rewards.cjk_numbers import read_cjk
from longrl.rewards.number_atoms import read_numeral, read_words
from longrl.rewards.number_tokens import Term, TokenLine, parse_numeral, tokenize, word_set

MAX_DEPTH = 8
"""Of parentheses within parentheses."""
MAX_VALUE = 1e300
ROUNDING = 0.02
"""Relative; how far the last side of an equation may be from what the first one works out to: 1/3 = 0.33."""
_FUNCTIONS = word_set("log ln lg sin cos tan cot exp arcsin arccos arctan sinh cosh tanh mod")
_PI = ("\\pi", "\u03c0", "pi")
_CJK_MINUS = "\u8d1f"
_TAILS = frozenset(("squared", "cubed", "factorial"))


@dataclass(frozen=True)
class Reading:
    """A number of a text."""

    value: float | None
    """None: not understood."""
    start: int
    """Of its characters in the plain text."""
    end: int
    is_weak: bool = False
    """A word that may be meant as a number or not: "first", "the one", "both"."""
    is_percent: bool = False


def read_expressions(text: str) -> list[Reading]:
    """All numbers of a plain text (`longrl.rewards.plain_numbers`), in order."""
    parser = ExpressionParser(TokenLine(tokenize(text)))
    tokens = parser.line.tokens
    readings: list[Reading] = []
    index = 0
    while index < len(tokens):
        # 1. The power of a letter: x^2 = 4 does not say what x is, and 2 is no number of its own.
        is_unknown = False
        if parser.line.text(index) in ("^", "**"):
            index = parser.line.skip_exponent(index)
            is_unknown = parser.line.text(index) == "="
            if not is_unknown:
                continue
            index += 1
        # 2. An argument: f(3) = 5.
        if parser.is_argument(index):
            index += 3
            continue
        # 3. An expression.
        term = parser.parse_equation(index)
        if term is None:
            index += 1
            continue
        is_finite = term.value is not None and abs(term.value) < MAX_VALUE
        value = term.value if is_finite and not is_unknown else None
        readings.append(Reading(value, tokens[index].start, tokens[term.end - 1].end, term.is_weak, term.is_percent))
        index = term.end
    return readings


_VARIABLES = frozenset("xyznkabcdefijopqrtuvwXYZ")
"""Single letters that a formula may have behind a number; others are units."""
_LABEL = re.compile(r"(?:(?:[^\W\d_]+ ){0,3}[^\W\d_]+(?:_\w+)?\s*[:=]\s*)*")


def read_quantity(text: str) -> Reading | None:
    """The number of a plain text that is nothing but one number, with a label ("x =") and a unit; None of any other."""
    label = _LABEL.match(text)
    start = label.end() if label else 0
    line = TokenLine(tokenize(text[start:]))
    term = ExpressionParser(line).parse_equation(0)
    if term is None or term.value is None or not abs(term.value) < MAX_VALUE:
        return None
    end = line.skip_unit(term.end)
    unit = [line.text(index) for index in range(end) if line.kind(index) in ("word", "name")]
    if _VARIABLES.intersection(unit) or any(line.text(index) not in ".,;!" for index in range(end, len(line.tokens))):
        return None
    return Reading(term.value, start, len(text), term.is_weak, term.is_percent)


@dataclass(frozen=True)
class ExpressionParser:
    """Recursive descent over tokens; each method takes an index and returns the `Term` that begins there, or None."""

    line: TokenLine

    def is_argument(self, index: int) -> bool:
        """Whether a number in parentheses stands right behind a single letter."""
        line = self.line
        is_call = line.text(index) == "(" and line.is_glued(index) and len(line.word(index - 1)) == 1
        return is_call and line.kind(index + 1) == "numeral" and line.text(index + 2) == ")"

    # ---- equations, sums, products ----

    def parse_equation(self, index: int) -> Term | None:
        """The last side of "2 + 2 = 4"; not understood when the sides differ."""
        side = self.parse_sum(index)
        is_equation = False
        while side is not None:
            sign = self.line.skip_unit(side.end)
            other = self._next_side(side, sign)
            if other is None:
                break
            if not _agree(side, other):
                if self.line.word(sign) in ("is", "are", "makes", "gives"):
                    break
                other = replace(other, value=None)
            is_equation = True
            side = replace(other, is_compound=True, is_weak=side.is_weak and other.is_weak)
        if side is not None and side.is_doubtful and not is_equation:
            return replace(side, value=None)
        return side

    def _next_side(self, side: Term, sign: int) -> Term | None:
        """The side of an equation behind a sign, or a word for one; None where there is no equation."""
        line = self.line
        is_equation = line.text(sign) == "=" or line.word(sign) in ("equals", "equal")
        if side.is_compound:  # "2 plus 2 is 4", but "frame 2 is 4 s long"; "1/3 ~ 0.33", but "40~42"
            is_equation |= line.text(sign) == "~" or line.word(sign) in ("is", "are", "makes", "gives")
        if not is_equation:
            return None
        start = sign + 1
        while line.word(start) in ("to", "about", "approximately") or line.text(start) in ("~", "="):
            start += 1
        return self.parse_sum(start)

    def parse_sum(self, index: int, depth: int = 0) -> Term | None:
        """Products with plus and minus between them."""
        line = self.line
        left = self.parse_product(index, depth)
        while left is not None:
            sign = line.skip_unit(left.end)
            name = {"plus": "+", "minus": "-"}.get(line.word(sign), line.text(sign))
            if name not in ("+", "-"):
                return left
            right = self.parse_product(sign + 1, depth)
            if right is None:
                is_open = line.text(sign) == "+" and line.is_glued(sign)  # "5+"
                return replace(left, value=None, end=sign + 1) if is_open else left
            value = None
            if left.value is not None and right.value is not None:
                value = left.value + (right.value if name == "+" else -right.value)
            is_doubtful = left.is_doubtful or right.is_doubtful or name == "-"
            left = Term(value, right.end, is_compound=True, is_doubtful=is_doubtful)
        return left

    def parse_product(self, index: int, depth: int = 0) -> Term | None:
        """Powers with signs of multiplication and division between them; a root or pi needs no sign before it."""
        line = self.line
        left = self.parse_signed(index, depth)
        num_divisions = 0
        while left is not None:
            name, sign = self._product_sign(left)
            right = self.parse_signed(sign + 1, depth) if name else None
            if right is None:
                return left
            num_divisions += name == "/"
            is_power_of_ten = line.text(sign + 1) == "10" and line.text(sign + 2) in ("^", "**")
            is_doubtful = left.is_doubtful or right.is_doubtful or (name == "\u00d7" and not is_power_of_ten)
            is_date = num_divisions > 1 or (name == "/" and re.match(r"0\d", line.text(sign - 1)) is not None)
            value = None if is_date else _combine(left.value, right.value, name)
            left = Term(value, right.end, is_compound=True, is_doubtful=is_doubtful)
        return left

    def _product_sign(self, left: Term) -> tuple[str, int]:
        """The sign behind a factor and its index; "" where there is none."""
        line = self.line
        if line.text(left.end) in ("\\sqrt", "\u221a", *_PI):
            return "*", left.end - 1
        sign = left.end if line.text(left.end) in ("*", "\u00d7", "/") else line.skip_unit(left.end)
        if line.word(sign) == "divided" and line.word(sign + 1) == "by":
            return "/", sign + 1
        name = {"x": "\u00d7", "times": "\u00d7"}.get(line.word(sign), line.text(sign))
        return (name, sign) if name in ("*", "\u00d7", "/") else ("", sign)

    # ---- signs and powers ----

    def parse_signed(self, index: int, depth: int = 0) -> Term | None:
        """A power with its sign."""
        line = self.line
        sign = line.word(index) or line.text(index)
        if line.kind(index) == "cjk" and sign.endswith(_CJK_MINUS) and line.is_glued(index + 1):
            sign = "minus"
        if sign not in ("-", "+", "minus", "negative"):
            return self.parse_power(index, depth)
        term = self.parse_power(index + 1, depth)
        if term is None:
            return None
        if sign in ("-", "+") and not line.is_glued(index + 1):
            before = line.text(index - 1)
            if not before:
                return replace(term, value=None)  # "- 5" may be an item of a list
            if before not in "=(:{":
                return None  # a dash: "Answer - 5"
        if sign != "+" and term.value is not None:
            term = replace(term, value=-term.value)
        return replace(term, is_weak=False)

    def parse_power(self, index: int, depth: int = 0) -> Term | None:
        """A number with its exponent."""
        line = self.line
        base = self.parse_atom(index, depth)
        if base is None:
            return None
        has_unit = line.kind(base.end - 1) == "word"  # 7cm^2
        if line.text(base.end) in ("^", "**") and not has_unit:
            exponent = self.parse_exponent(base.end + 1, depth)
            if exponent is None:
                return replace(base, value=None, end=line.skip_exponent(base.end))
            return Term(_power(base.value, exponent.value), exponent.end, is_compound=True)
        if line.word(base.end) in _TAILS:
            return replace(base, value=None, end=base.end + 1)
        return base

    def parse_exponent(self, index: int, depth: int) -> Term | None:
        """The 10 of 2^10 and of 2^{10}; a tower of powers is not understood."""
        line = self.line
        if line.kind(index) == "numeral":
            value = parse_numeral(line.text(index))
            is_tower = line.text(index + 1) in ("^", "**")
            return Term(None if is_tower else value, index + 1)
        if line.text(index) == "-" and line.kind(index + 1) == "numeral":
            value = parse_numeral(line.text(index + 1))
            return Term(None if value is None else -value, index + 2)
        return self.parse_group(index, depth)

    # ---- what stands by itself ----

    def parse_atom(self, index: int, depth: int = 0) -> Term | None:
        """A numeral, a number in words, a root, a fraction of LaTeX, or a group."""
        line = self.line
        text, kind = line.text(index), line.kind(index)
        if kind == "numeral":
            return self._mixed_number(index, depth)
        if kind in ("cjk", "cjk_numeral"):
            return read_cjk(line, index)
        if text == "\\frac":
            return self.parse_frac(index, depth)
        if text in ("\\sqrt", "\u221a") or line.word(index) == "sqrt":
            return self.parse_root(index, depth)
        if text in _PI:
            return Term(math.pi, index + 1, is_compound=True)
        if text.lstrip("\\").lower() in _FUNCTIONS:
            inner = self.parse_argument(index + 1, depth)
            return None if inner is None else replace(inner, value=None)
        if kind == "word":
            return read_words(line, index)
        return self.parse_group(index, depth)

    def _mixed_number(self, index: int, depth: int) -> Term:
        r"""A numeral, with the fraction of LaTeX that may stand right behind it: `1\frac{1}{2}`."""
        whole = read_numeral(self.line, index)
        if self.line.text(whole.end) != "\\frac":
            return whole
        part = self.parse_frac(whole.end, depth)
        if whole.value is None or part.value is None or not 0 < part.value < 1:
            return replace(part, value=None)
        return replace(part, value=whole.value + part.value)

    def parse_frac(self, index: int, depth: int) -> Term:
        r"""`\frac{1}{2}`, `\frac12` and `\frac1{2}`."""
        line = self.line
        if re.fullmatch(r"\d\d", line.text(index + 1)):
            digits = line.text(index + 1)
            return Term(_combine(float(digits[0]), float(digits[1]), "/"), index + 2, is_compound=True)
        numerator = self.parse_argument(index + 1, depth)
        denominator = self.parse_argument(numerator.end, depth) if numerator else None
        if numerator is None or denominator is None:
            return Term(None, index + 1)
        return Term(_combine(numerator.value, denominator.value, "/"), denominator.end, is_compound=True)

    def parse_root(self, index: int, depth: int) -> Term:
        r"""`\sqrt{2}`, `\sqrt[3]{8}` and `sqrt(2)`."""
        line = self.line
        degree: float | None = 2.0
        start = index + 1
        if line.text(start) == "[" and line.text(start + 2) == "]":
            degree = parse_numeral(line.text(start + 1)) if line.kind(start + 1) == "numeral" else None
            start += 3
        radicand = self.parse_argument(start, depth)
        if radicand is None:
            return Term(None, index + 1)
        is_real = bool(degree) and radicand.value is not None and radicand.value >= 0
        value = _power(radicand.value, 1 / degree) if is_real and degree else None
        return Term(value, radicand.end, is_compound=True)

    def parse_argument(self, index: int, depth: int) -> Term | None:
        r"""What a command of LaTeX takes: a group, or a numeral."""
        if self.line.kind(index) == "numeral":
            return Term(parse_numeral(self.line.text(index)), index + 1)
        return self.parse_group(index, depth)

    def parse_group(self, index: int, depth: int) -> Term | None:
        """An expression between a pair of parentheses, braces or bars."""
        line = self.line
        closing = {"(": ")", "{": "}", "|": "|"}.get(line.text(index))
        if closing is None or depth >= MAX_DEPTH:
            return None
        inner = self.parse_sum(index + 1, depth + 1)
        if inner is None:
            return None
        end = line.skip_unit(inner.end)
        if line.text(end) != closing:
            return None
        value = inner.value
        if closing == "|" and value is not None:
            value = abs(value)
        return replace(inner, value=value, end=end + 1)


def _agree(side: Term, other: Term) -> bool:
    """Whether two sides of an equation are equal, the second one rounded perhaps."""
    if side.value is None or other.value is None:
        return False
    rounding = ROUNDING if side.is_compound else 1e-9
    return math.isclose(side.value, other.value, rel_tol=rounding, abs_tol=1e-9)


def _combine(left: float | None, right: float | None, sign: str) -> float | None:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    return left / right if sign == "/" else left * right


def _power(base: float | None, exponent: float | None) -> float | None:
    """A real power within the range of floats, else None."""
    if base is None or exponent is None:
        return None
    try:
        value = base**exponent
    except (OverflowError, ZeroDivisionError):
        return None
    return None if isinstance(value, complex) else value
