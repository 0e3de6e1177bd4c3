"""Multiple choice: the options of a question, the option a text settles on, and whether it is the right one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from longrl.rewards.answer_text import lenient_text, strict_text
from longrl.rewards.letters import DEFAULT_LETTERS, extract_letter, lone_letter, plain_text, without_lead_in

if TYPE_CHECKING:
    from longrl.types import Completion, Row

__all__ = ["choose", "extract_letter", "multiple_choice", "multiple_choice_lenient", "parse_options"]


def multiple_choice(completion: Completion, row: Row) -> float:
    """1.0 when the content of `<answer>` settles on the option `row.answer`, else 0.0."""
    return _is_right(strict_text(completion.text), row)


def multiple_choice_lenient(completion: Completion, row: Row) -> float:
    """As `multiple_choice`; without an `<answer>` the text after the thinking is read instead."""
    return _is_right(lenient_text(completion.text), row)


def _is_right(text: str, row: Row) -> float:
    return float(choose(text, parse_options(row.problem)) == row.answer.strip().upper())


def choose(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option a text settles on, by its letter or by its wording; None when unclear.

    Args:
        text: content of an `<answer>` tag, or a whole final statement.
        options: letter -> wording, as `parse_options` returns; when empty, any of A-H counts.
    """
    letters = "".join(options) or DEFAULT_LETTERS
    return (
        lone_letter(text, letters)
        or _same_wording(text, options)
        or extract_letter(text, letters)
        or _contained_wording(text, options)
    )


# ---- the options of a question ----

_MARKERS = (
    re.compile(r"^[ \t>*-]*\(?([A-Z])\s?[).:][ \t*]*", re.MULTILINE | re.IGNORECASE),  # "A. text" on its own line
    re.compile(r"(?<![\w(])\(([A-Z])\)[ \t]*"),  # (A) text (B) text
    re.compile(r"(?<!\S)([A-Z])[).:]\s+"),  # A. text B. text
)


def parse_options(problem: str) -> dict[str, str]:
    r"""Options of a question by letter: "Which?\nA. cat\nB. dog" gives `{"A": "cat", "B": "dog"}`.

    Reads "A. x", "A) x", "(A) x" and "A: x", one per line or in one line; letters must run from A without a gap.

    Returns:
        {} when the text holds no two such options.
    """
    text = unicodedata.normalize("NFKC", problem)
    for marker in _MARKERS:
        run = _longest_run(marker.finditer(text))
        if len(run) >= 2:
            return _texts_between(text, run)
    return {}


def _longest_run(matches: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Longest run of markers A, B, C, ...; the later of equals, since options follow the question."""
    best: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for match in matches:
        letter = match[1].upper()
        if letter == chr(ord("A") + len(run)):
            run.append(match)
        elif letter == "A":
            run = [match]
        if len(run) >= len(best):
            best = run
    return best


def _texts_between(text: str, run: list[re.Match[str]]) -> dict[str, str]:
    stops = [match.start() for match in run[1:]] + [len(text)]
    bodies = [text[match.end() : stop] for match, stop in zip(run, stops, strict=True)]
    bodies[-1] = bodies[-1].lstrip().partition("\n")[0]  # what follows the last option is an instruction
    return {match[1].upper(): " ".join(body.split()).strip(" ,;*") for match, body in zip(run, bodies, strict=True)}


# ---- an answer that repeats an option's wording ----


def _words(text: str) -> str:
    """Lower-case words without punctuation and articles, single-spaced."""
    words = re.findall(r"\w+", plain_text(text).lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _same_wording(text: str, options: Mapping[str, str]) -> str | None:
    said = {_words(text), _words(without_lead_in(text))} - {""}
    return _single([letter for letter, wording in options.items() if _words(wording) in said])


def _contained_wording(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose wording occurs in the text; "a red car" beats "car" where both do."""
    said = f" {_words(text)} "
    inside = {letter: f" {_words(wording)} " for letter, wording in options.items() if _words(wording)}
    inside = {letter: wording for letter, wording in inside.items() if wording in said}
    longest = [a for a, wording in inside.items() if not any(wording in b and wording != b for b in inside.values())]
    return _single(longest)


def _single(letters: list[str]) -> str | None:
    return letters[0] if len(letters) == 1 else None
