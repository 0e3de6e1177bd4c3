"""Comparisons that need no computer algebra: of numbers with their units, of words, and of statements that hedge."""

from __future__ import annotations

import math
import re

from longrl.rewards.math_text import plain_formula
from longrl.rewards.number_expressions import ROUNDING, Reading, read_quantity
from longrl.rewards.number_readings import settled_number
from longrl.rewards.plain_numbers import last_boxed, plain_number_text

EXACTNESS = 1e-9
"""Relative; 0.333 is not 1/3."""
_WORDS = re.compile(r"[^\W\d_]+(?:[ -]+[^\W\d_]+)*")
_LETTER = re.compile(r"\(?([A-Ha-h])\)?")
_PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|frac|arc\w+|mod|gcd|lcm|max|min)\b)"
    r"(?:[A-Za-z]{3,}|is|it|so|we|of|to)\b(?!\()"
    r"|[\u3040-\u9fff\uac00-\ud7af]",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:or|not|never|neither|nor|either|between|cannot|than|at least|at most|up to|except|without|about|maybe"
    r"|perhaps)\b|n't\b",
    re.IGNORECASE,
)
_RELATION = re.compile(
    r"\\(?:leq?|geq?|leqslant|geqslant|neq?|lt|gt|pm|mp)(?![A-Za-z])|[<>\u2264\u2265\u2260\u00b1]|!="
)
_LIST = re.compile(r"\d,\d{1,2}(?!\d)|,\s")
"""In mathematics "1,2" is a list; as an answer to 1.2 it is a decimal comma."""
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_EQUALS = re.compile(r"(?<![<>!=:])=(?!=)")


def compare_statements(gold: str, answer: str, *, prose: bool = False) -> bool | None:
    """Whether an answer has the value of the ground truth; None where only a computer algebra system can tell.

    Args:
        gold: the ground truth.
        answer: an expression, or one in a few words.
        prose: it is running text, of which the last expression counts where no number is settled on.
    """
    truth, said = plain_formula(gold), plain_formula(answer)
    if truth and truth == said:
        return True
    # 1. A ratio in words, a word, or the letter of an option.
    if _RATIO.fullmatch(truth) and re.sub(r"\s*(?::|\bto\b)\s*", ":", said) == truth.replace(" ", ""):
        return True
    if _WORDS.fullmatch(truth) and not _is_symbol(truth):
        return _same_words(truth, said)
    # 2. An untrue equation.
    sides = [_quantity(side) for side in _EQUALS.split(said)]
    values = [side.value for side in sides if side is not None and side.value is not None]
    if len(sides) > 1 and values and not all(math.isclose(values[0], value, rel_tol=ROUNDING) for value in values):
        return False
    # 3. Numbers.
    number = None if _LIST.search(truth) else _quantity(gold)
    if number is None:
        return False if _hedges(said, truth) else None
    is_same = _compare_number(number, gold, answer, said)
    has_words = not prose and "\\" not in said and _PROSE.search(said) is not None
    return False if is_same is None and has_words else is_same


def _compare_number(gold: Reading, gold_text: str, answer: str, formula: str) -> bool | None:
    """Whether an answer gives a number; None where it is a formula, or gives none."""
    hedges = _hedges(formula, gold_text)
    quantity = None if hedges else _quantity(answer)
    if quantity is None and (hedges or _PROSE.search(formula)):
        quantity = settled_number(answer)
    if quantity is not None and quantity.value is not None:
        is_same = _same_number(gold, quantity, gold_text, answer)
        return None if not is_same and _LIST.search(formula) else is_same
    if hedges or _RELATION.search(formula):
        return False
    return None


def _quantity(text: str) -> Reading | None:
    boxed = last_boxed(text)
    return read_quantity(plain_number_text(text if boxed is None else boxed).strip())


def _same_number(gold: Reading, said: Reading, gold_text: str, said_text: str) -> bool:
    digits = gold_text.strip(), said_text.strip()
    if all(text.isdecimal() for text in digits):  # floats hold 15 of them
        return int(digits[0]) == int(digits[1])
    assert gold.value is not None
    assert said.value is not None
    values = [said.value]
    if said.is_percent != gold.is_percent:
        values.append(said.value / 100 if said.is_percent else said.value * 100)
    return any(math.isclose(gold.value, value, rel_tol=EXACTNESS, abs_tol=1e-12) for value in values)


def _hedges(said: str, truth: str) -> bool:
    """Whether an answer has words that take back its value; a ground truth of several values may be joined by "or"."""
    if _HEDGE.search(truth):
        return False
    if "," in truth or r"\pm" in truth:
        said = re.sub(r"\bor\b", ",", said)
    return _HEDGE.search(said) is not None


def _is_symbol(text: str) -> bool:
    """Whether a word may be a product of variables, or a unit of mathematics: "x", "ab", "i"."""
    return len(text) <= 2 and not _LETTER.fullmatch(text) and text.lower() != "no"


def _same_words(truth: str, said: str) -> bool:
    letters = _LETTER.fullmatch(truth), _LETTER.fullmatch(said)
    if letters[0]:
        return letters[1] is not None and letters[0][1].upper() == letters[1][1].upper()
    words = [" ".join(re.findall(r"[^\W_]+", text.casefold())) for text in (truth, said)]
    return words[0] == words[1]
