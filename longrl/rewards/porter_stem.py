"""Stems of English words by Porter's algorithm, as ROUGE compares them.

M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980, with the departures of NLTK's implementation,
that of google's rouge-score and so of Video-R1's released rewards. Written here because it is small and will not
change, while NLTK brings packages of its own; tested against stems by NLTK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
Rules = Sequence[tuple[str, str]]
_STEP_2: Rules = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_STEP_3: Rules = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


MAX_KEPT_CHARS = 40
"""The stem of a longer word is not kept: it is a model's invention, and may have thousands."""


def stem_word(word: str) -> str:
    """The stem of a word in lower case: "running" gives "run", "happily" "happili"."""
    return _kept_stem(word) if len(word) <= MAX_KEPT_CHARS else _stem(word)


def _stem(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _final_y(_past_and_gerund(_plural(word)))
    word = _derived(word)
    word = _replace_first(word, _STEP_3, lambda stem, _: _measure(stem) > 0)
    word = _replace_first(word, [(suffix, "") for suffix in _STEP_4], _is_long)
    return _final_l(_final_e(word))


_kept_stem = lru_cache(maxsize=65536)(_stem)


def _shape(word: str) -> str:
    """A "c" for each consonant and a "v" for each vowel; "y" is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and shape[-1:] == "c")
        shape += "v" if is_vowel else "c"
    return shape


def _measure(stem: str) -> int:
    """How often vowels are followed by consonants."""
    return _shape(stem).count("vc")


def _ends_cvc(word: str) -> bool:
    shape = _shape(word)
    return shape == "vc" or (shape[-3:] == "cvc" and word[-1] not in "wxy")


def _replace_first(word: str, rules: Rules, condition: Callable[[str, str], bool]) -> str:
    """Replaces the first suffix of some that the word has, where its stem fulfils a condition."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[: len(word) - len(suffix)]
            return stem + replacement if condition(stem, suffix) else word
    return word


def _is_long(stem: str, suffix: str) -> bool:
    return _measure(stem) > 1 and (suffix != "ion" or stem[-1:] in ("s", "t"))


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _replace_first(word, (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")), lambda *_: True)


def _past_and_gerund(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word[: len(word) - len(suffix)]
        if word.endswith(suffix) and "v" in _shape(stem):
            break
    else:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1] == stem[-2:-1] and _shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_cvc(stem) else stem


def _final_y(word: str) -> str:
    is_behind_consonant = len(word) > 2 and _shape(word[:-1])[-1] == "c"
    return word[:-1] + "i" if word.endswith("y") and is_behind_consonant else word


def _derived(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _derived(word[:-2])
    if word.endswith("logi"):  # the one rule whose stem keeps a letter of the suffix
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace_first(word, _STEP_2, lambda stem, _: _measure(stem) > 0)


def _final_e(word: str) -> str:
    stem = word[:-1]
    if not word.endswith("e"):
        return word
    return stem if _measure(stem) > 1 or (_measure(stem) == 1 and not _ends_cvc(stem)) else word


def _final_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
