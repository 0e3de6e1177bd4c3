r"""Formulas in one spelling, LaTeX's, before a computer algebra system reads them, and what it should not be asked.

`**x\u00b2 + 2\u221a3.**` becomes `x^{2} + 2\sqrt{3}`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from longrl.rewards.plain_numbers import end_of_text

# ---- one spelling ----

_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SYMBOLS = {
    "\u2212": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times ", "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ", "\u00f7": r"\div ", "\u03c0": r"\pi ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ", "\u03bb": r"\lambda ", "\u221e": r"\infty ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ",
    "\u2264": r"\leq ", "\u2265": r"\geq ", "\u2260": r"\neq ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u2208": r"\in ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2248": r"\approx ", "\u2044": "/",
    "\u00b0": r"^\circ ", "\u00ba": r"^\circ ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u3002": ".", "\u2026": "...",
}  # fmt: skip
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan"
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"</?[A-Za-z]\w*\s*/?>|<\|\w{1,40}\|>", " "),
        (r"\\(?:text|textrm|mathrm|textbf|mathbf|textit|mbox|bm)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[,;:!]|\\n(?![A-Za-z])|\\(?:quad|qquad|displaystyle|left\.|right\.)(?![A-Za-z])|\\\s", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\[()\[\]]|\\\$|\$", " "),
        (r"\{,\}", ","),
        (r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"\u221a\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\u221a\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|infty)(?![A-Za-z])", r"\\infty "),
        (r">=", r"\\geq "),
        (r"<=", r"\\leq "),
        (r"!=", r"\\neq "),
        (r"(?<=[\w)\]}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"(?<![\w*)\]}])\*+|\*+(?![\w({*\\ -])|`+", " "),
        (r"\^\s*(-?\d\d+)", r"^{\1}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])", r"\1\\times 10^{\2}"),
    )
)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")
_LEAD_IN = re.compile(
    r"^\W*(?:(?:so|thus|therefore|hence)\W+)?(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+(?:is|equals)\b)?\s*[:=]?\s*",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"(?<![\d.])(\d{0,12})\.(\d{0,12})\\overline\{(\d{1,12})\}")
_AND_SO_ON = re.compile(r"(?<![\d.])(\d{0,12})\.(\d{0,6}?)(\d{1,3}?)\3{2,8}(?:\.{3}|\\l?dots)")
MAX_CHARS = 4000
_ENDS = " \t\n\r.,;:\"'"


def plain_formula(text: str) -> str:
    r"""A formula in LaTeX without Markdown, delimiters, text macros, a lead-in ("The answer is") and punctuation."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _FRACTION.sub(
        lambda match: _latex_fraction(Fraction(unicodedata.numeric(match[0])).limit_denominator(10)), text
    )
    text = unicodedata.normalize("NFKC", "".join(_SYMBOLS.get(character, character) for character in text))
    text = end_of_text(text, MAX_CHARS)  # of one character NFKC makes up to 18
    text = "".join(_SYMBOLS.get(character, character) for character in text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    for pattern in (_REPEATING, _AND_SO_ON):
        text = pattern.sub(lambda match: _latex_fraction(_repeating_decimal(*match.groups())), text)
    text = _LEAD_IN.sub("", re.sub(r"\s+", " ", text))
    return text.strip(_ENDS).rstrip("\\").strip(_ENDS)


def _latex_fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _repeating_decimal(whole: str, start: str, period: str) -> Fraction:
    """0.1333.. for whole "0", start "1" and period "3"."""
    begin, full = int(whole + start or 0), int(whole + start + period)
    return Fraction(full - begin, 10 ** len(start) * (10 ** len(period) - 1))


# ---- what a system should not be asked ----

MAX_EXPONENT_DIGITS = 4
MAX_DIGITS = 100
_ABSURD = re.compile(
    rf"\d{{{MAX_DIGITS},}}"
    rf"|\^[\s{{(]*[-+]?\d[\d,]{{{MAX_EXPONENT_DIGITS},}}"  # 2^{100000}
    r"|[)}]\s*\^[\s{(]*\d{3,}"  # (x+y+z)^{999}
    r"|\d\s*\^[\s{(]*\d+\s*\^[\s{(]*\d"  # 9^{9^9}
    r"|\^[\s{(]*\d+[\s})]*\^[\s{(]*\d+[\s})]*\^"  # ((9^9)^9)^9
    r"|\d{4,}[\s)}]*!|![\s)}]*!"
)
_NESTING = re.compile(r"[({\[]")
MAX_OPENINGS = 200


def is_absurd(formula: str) -> bool:
    """Whether a formula would take a computer algebra system for ever: towers of powers, thousands of digits."""
    return _ABSURD.search(formula) is not None or len(_NESTING.findall(formula)) > MAX_OPENINGS
