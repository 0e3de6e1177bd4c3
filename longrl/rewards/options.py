"""The options that a question lists, by the label that each stands behind."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

DEFAULT_LETTERS = "ABCDEFGH"
"""Labels of options where a question does not list any."""

_LABELS = (
    (
        re.compile(r"^[ \t>*-]*\(?([A-Z]{1,2})\s?[).:][ \t*]*", re.MULTILINE | re.IGNORECASE),  # "A. text" on its line
        re.compile(r"(?<![\w(])\(([A-Z]{1,2})\)[ \t]*"),  # (A) text (B) text
        re.compile(r"(?<!\S)([A-Z]{1,2})[).:]\s+"),  # A. text B. text
    ),
    (
        re.compile(r"^[ \t>*-]*\(?(\d{1,2})\s?[).:](?!\d)[ \t*]*", re.MULTILINE),  # "1. text" on its own line
        re.compile(r"(?<![\w(])\((\d{1,2})\)[ \t]*"),  # (1) text (2) text
        re.compile(r"(?<!\S)(\d{1,2})[).]\s+"),  # 1. text 2. text
    ),
)
"""How labels are written: letters, and numbers where there are none."""


def option_label(index: int) -> str:
    """Label of an option, counted from 0: A to Z, then AA, AB and so on, as columns of a table."""
    label = ""
    while index >= 0:
        label = chr(ord("A") + index % 26) + label
        index = index // 26 - 1
    return label


def with_options(question: str, options: Iterable[str]) -> str:
    """A question with a line for each of its options, as a model reads it."""
    lines = (f"{option_label(index)}. {option}" for index, option in enumerate(options))
    return "\n".join([question, *lines])


def parse_options(problem: str) -> dict[str, str]:
    r"""Options of a question by label: "Which?\nA. cat\nB. dog" gives `{"A": "cat", "B": "dog"}`.

    Reads "A. x", "A) x", "(A) x" and "A: x", one per line or in one line, from A without a gap; AA follows Z. Where no
    letters stand, numbers from 1 on are read alike, unless a question follows them: then they are what it is about.

    Returns:
        {} when the text holds no two such options.
    """
    text = unicodedata.normalize("NFKC", problem)
    run = _labels_of(text)
    return _wordings(text, run) if run else {}


def without_options(problem: str) -> str:
    """The question alone: what stands before its options, or all of it where none or nothing does."""
    text = unicodedata.normalize("NFKC", problem)
    run = _labels_of(text)
    return (text[: run[0].start()].strip() if run else "") or problem.strip()


def _labels_of(text: str) -> list[re.Match[str]]:
    """The labels of a text's options, none or at least two."""
    for is_numbered, patterns in enumerate(_LABELS):
        for pattern in patterns:
            run = _longest_run(list(pattern.finditer(text)), is_numbered=bool(is_numbered))
            if len(run) >= 2 and not (is_numbered and "?" in text[run[-1].end() :]):
                return run
    return []


def _longest_run(labels: list[re.Match[str]], *, is_numbered: bool) -> list[re.Match[str]]:
    """The longest run of labels without a gap; the later of equals, since options follow the question."""
    best: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for match in labels:
        label = match[1].upper()
        if label == (str(len(run) + 1) if is_numbered else option_label(len(run))):
            run.append(match)
        elif label in ("A", "1"):
            run = [match]
        if len(run) >= len(best):
            best = run
    return best


def _wordings(text: str, labels: list[re.Match[str]]) -> dict[str, str]:
    """What stands behind each label, up to the next one."""
    stops = [match.start() for match in labels[1:]] + [len(text)]
    bodies = [text[match.end() : stop] for match, stop in zip(labels, stops, strict=True)]
    bodies[-1] = bodies[-1].lstrip().partition("\n")[0]  # what follows the last option is an instruction
    wordings = [" ".join(body.split()).strip(" ,;*") for body in bodies]
    return {match[1].upper(): wording for match, wording in zip(labels, wordings, strict=True)}
