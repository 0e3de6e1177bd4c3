"""How a text means an option where it names it: as its answer, as ruled out, or only in passing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from importlib.resources import files
from typing import NamedTuple

import yaml

REACH = 80
"""Characters before and behind an option that can tell how it is meant."""
STOP = r"[.,;!?\n|\u3002\u3001\u060c]"  # the last three are Chinese and Arabic
CUT = "\u25a0"
"""Ends the text behind an option where the next one is named."""


class Stance(Enum):
    """How an option is meant where it is named."""

    CHOSEN = auto()
    """Called the answer: "I choose B"."""
    RIGHT = auto()
    """Given a good verdict, as several options may be: "B fits"."""
    NAMED = auto()
    """None of the others: "B shows a dog"."""
    CONCEDED = auto()
    """Named in passing: "although B is tempting"."""
    REJECTED = auto()
    """Called wrong, or left out: "not B"."""


class Verdict(NamedTuple):
    """What the text behind an option says of it."""

    stance: Stance
    length: int
    """Characters that say so; they say nothing of the next option."""


# ---- the vocabulary ----

_WORDS: dict[str, dict[str, str]] = yaml.safe_load(
    files(__package__).joinpath("option_words.yaml").read_text(encoding="utf-8")
)
_UNSPACED = ("zh", "ja", "ko", "th")


def words(*kinds: str) -> str:
    """A pattern for any word of some kinds of `option_words.yaml`, whatever its language."""
    return rf"(?:{spaced_words(*kinds)}|{unspaced_words(*kinds)})"


def spaced_words(*kinds: str) -> str:
    """As `words`, of the languages that part words by spaces: whole words alone."""
    return rf"(?<!\w)(?:{_entries(kinds, unspaced=False)})(?!\w)"


def unspaced_words(*kinds: str) -> str:
    """As `words`, of the languages that do not: anywhere."""
    return rf"(?:{_entries(kinds, unspaced=True)})"


def _entries(kinds: Sequence[str], *, unspaced: bool) -> str:
    parts = [
        re.sub(r"\s+\|\s+", "|", entries.strip())
        for kind in kinds
        for language, entries in _WORDS[kind].items()
        if (language in _UNSPACED) == unspaced
    ]
    return "|".join(parts) or "(?!)"


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


# ---- before the option ----

_OPENING = r"[\s:=()\[\]>,/-]*"
_CLAUSE_END = _compile(rf"{STOP}|{words('so', 'but', 'because')}")
_NOT = _compile(words("not_before"))
_HEAD = _compile(
    rf".*(?P<head>{words('answer')}(?:(?!{STOP}).){{0,50}}|"
    rf"(?:=|{words('it_is')})(?: \w+ly| {words('link', 'naming', 'so')})*){_OPENING}$"
)
_DENIED = _compile(rf"(?:{words('not_before', 'wrong')}|n'|\u4e0d)\s?$")  # the last is the Chinese "not"
_DENIED_CLAIM = _compile(rf"{words('not_before')}[^.;!?\n]{{0,12}}?\s?{words('claim')}|{words('doubt')}")
_AT_FIRST = _compile(words("at_first"))
_CONCESSION = _compile(words("though", "at_first"))
_LESS_THAN = _compile(r"\b(?:less|worse|weaker|lower)\b[^.;!?\n]*\bthan\W*$|\bloses to\W*$")
_THAN = _compile(r"\b(?:than|over|beats|outweighs|que|als|\u0447\u0435\u043c)\W*$|^ ?>\s*$|\u6bd4\W*$")
_EXCEPT = _compile(
    rf"\b(?:all|every\w*|each|any\w*|none|nothing|no)\b[^.,;:!?\n]{{0,25}}{words('except')}\W*(?:{words('naming')}\W*)?$"
    r"|\u9664\u4e86\W*$"  # Chinese
)
_NOTHING_BUT = _compile(r"\b(?:none|nothing|no)\b")
_CALLED_WRONG = _compile(
    r"(?<!\w)(?:(?:(?:incorrect|wrong|false)(?: (?:one|answer|option|choice)s?)?|distractors?)(?: is| are|\s?[:(])|not|"
    r"nope)[\s:(\[]*$"
)
_WRONG_MARK = _compile(rf"{words('wrong_mark')}[\s(\[]*$")
_RIGHT_MARK = _compile(rf"{words('right_mark')}[\s(\[]*$")


def stance_before(before: str) -> Stance:
    """What the text that leads up to an option says of it; its last `REACH` characters count."""
    before = before[-REACH:]
    if _RIGHT_MARK.search(before) or _LESS_THAN.search(before):
        return Stance.RIGHT
    if excepts(before):
        return Stance.RIGHT if _NOTHING_BUT.search(before) else Stance.REJECTED
    if _WRONG_MARK.search(before) or _CALLED_WRONG.search(before) or _THAN.search(before):
        return Stance.REJECTED
    # A head may stand in a line of its own, "Answer:\nB"; a "not" must stand in the clause of the option itself.
    head = _HEAD.match(before)
    clause = _last_clause(before[: head.start("head")] if head else before)
    if head and _AT_FIRST.search(clause + head["head"]):
        return Stance.CONCEDED
    if head:
        denied = _NOT.search(head["head"]) or _DENIED.search(clause) or _DENIED_CLAIM.search(clause + head["head"])
        return Stance.REJECTED if denied else Stance.CHOSEN
    if _NOT.search(clause) or _DENIED_CLAIM.search(clause):
        return Stance.REJECTED
    return Stance.CONCEDED if _CONCESSION.search(clause) else Stance.NAMED


def excepts(before: str) -> bool:
    """Whether an option is the one left out of what is said: "all but B"."""
    return _EXCEPT.search(before[-REACH:]) is not None


def has_mark(before: str) -> bool:
    """Whether a tick or cross stands right before an option."""
    return bool(_WRONG_MARK.search(before[-REACH:]) or _RIGHT_MARK.search(before[-REACH:]))


def _last_clause(text: str) -> str:
    start = max((match.end() for match in _CLAUSE_END.finditer(text)), default=0)
    return text[start:]


# ---- behind the option ----

_LINK = rf"(?:\s*{words('link')})"
_MORE = r"(?:\s(?:only|most|more|much|far|very|single))*"
_BREAK = r"[\s)\]:|=,.?!/(\u2014\u2013-]{0,6}"
_ENDS = rf"(?=\s*(?:{STOP}|[()\[\]\u2014\u2013-]|$))"
_ENDS_OR_WHY = rf"(?=\s*(?:{STOP}|[()\[\]\u2014\u2013-]|$|{words('because')}))"
_NOT_WRONG = _compile(rf"[)\]]?{_LINK}*\s*{words('not_behind')}{_LINK}*\s*{words('wrong')}")
_WRONG = _compile(
    # "B is not", "B isn't", "B does not"; a bare "not" may belong to what follows: "B not C"
    rf"[)\]]?(?:{_LINK}+\s*{words('not_behind')}|\s?\w+n't\b|{unspaced_words('not_behind')}|"
    rf"\s{spaced_words('not_behind')}\s(?!the |any |an? |los |les |die )\w|{_LINK}+\s*{words('wrong')}|"
    # "B incorrect"; in a line of its own it may head what follows: "B\nIncorrect: A"
    rf" ?{words('wrong')})|"
    # "B: wrong", "B (no)"
    rf"{_BREAK}(?:{_LINK}*\s?{words('wrong')}{_ENDS_OR_WHY}|{words('says_no')}{_ENDS}|{words('wrong_mark')}|"
    rf"not {words('shown')}|(?:no|not) (?:wait|evidence|such))|"
    # "B - not applicable"; "B. No C. Yes"
    rf"\s?[:=|(\u2014\u2013-]\s?not \w+{_ENDS}|[).:|=?!-]\s?{words('says_no')}\s?{CUT}"
)
_RIGHT = _compile(
    # "B is right", "B fits", "B fits the video best"
    rf"[)\]]?(?:{_LINK}+{_MORE}\s*{words('right')}|\s?{words('right')}{_ENDS}|{unspaced_words('right')}|"
    rf"\s{words('fits')}(?:{_ENDS}| (?:\w+ ){{0,3}}?(?:best|better)\b)| (?:best|better) \w+s\b)|"
    # "B: yes"
    rf"{_BREAK}(?:{words('says_yes', 'shown')}{_ENDS}|{words('right_mark')})"
)
_CONCEDED = _compile(rf"(?:(?!{STOP}|{CUT}|\().){{0,30}}{words('at_first')}|[)\]]?\s?\?")
_LIKEWISE = _compile(rf"[\s,]*{words('likewise')}{_ENDS}")
_VERDICTS = (
    (_NOT_WRONG, Stance.RIGHT),
    (_WRONG, Stance.REJECTED),
    (_CONCEDED, Stance.CONCEDED),
    (_RIGHT, Stance.RIGHT),
)


def verdict_behind(after: str) -> Verdict:
    """What the text behind an option says of it.

    Args:
        after: up to the next option, with `CUT` where there is one; its first `REACH` characters count.
    """
    after = after[:REACH]
    for pattern, stance in _VERDICTS:
        match = pattern.match(after)
        if match:
            return Verdict(stance, match.end())
    return Verdict(Stance.NAMED, 0)


def is_likewise(after: str) -> bool:
    """Whether an option is meant as the one before it: "A is wrong, C too"."""
    return _LIKEWISE.match(after[:REACH]) is not None


# ---- between two options ----

_TURNS = {turn: _compile(words(turn)) for turn in ("or", "correction", "but", "so")}


def turn_between(gap: str) -> str | None:
    """What a text does between two options: "or" offers both, "correction" and "but" take back, "so" concludes.

    Returns:
        The last of these, for "but also" offers; "or" where no word stands between; None where none of these does.
    """
    gap = gap[-REACH:]
    if not re.search(r"\w", gap):
        return "or"
    last, found = -1, None
    for turn, pattern in _TURNS.items():
        for match in pattern.finditer(gap):
            if match.start() > last:
                last, found = match.start(), turn
    return found
