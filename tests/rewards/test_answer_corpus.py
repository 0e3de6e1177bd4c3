"""Answers as models word them, and what a reader takes each for: at most 2% of a task may be read otherwise.

A line of `answers.jsonl` is one case. Those with `"origin": "own"` were written after the others, to be like them in
kind but not in wording: rules that hold for both are likely to hold for answers that nobody wrote down. Tasks:

- `multiple_choice`: an answer, its options, and whether it is to be `right` for the letter `gold`;
- `letter_symmetry`: a template that must be read as the letter that stands for `{L}`, whichever of the options it is.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrl.rewards.option_choice import chosen_option

Case = dict[str, Any]
MAX_ERRORS = 0.02
CASES: dict[str, list[Case]] = defaultdict(list)
for line in Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines():
    CASES[json.loads(line)["task"]].append(json.loads(line))


def misread_choice(case: Case) -> str | None:
    letter = chosen_option(case["answer_text"], case["options"])
    if (letter == case["gold"]) == bool(case["right"]):
        return None
    return f"{case['answer_text']!r} of {case['options']} is {letter}, which is wrong for {case['gold']}"


def letters_of(template: str, options: dict[str, str]) -> dict[str, str | None]:
    """Letter -> the letter that is read where it is filled in."""
    return {letter: chosen_option(template.replace("{L}", letter), options) for letter in options}


def misread_letters(case: Case) -> str | None:
    read = letters_of(case["template"], case["options"])
    return None if all(letter == filled for filled, letter in read.items()) else f"{case['template']!r}: {read}"


MISREAD: dict[str, Callable[[Case], str | None]] = {
    "multiple_choice": misread_choice,
    "letter_symmetry": misread_letters,
}
"""Task -> what is wrong with the reading of a case, None for nothing. Tasks of numbers join here."""


@pytest.mark.parametrize("origin", ["given", "own"])
@pytest.mark.parametrize("task", MISREAD)
def test_answers_are_read_as_a_reader_reads_them(task, origin):
    cases = [case for case in CASES[task] if case.get("origin", "given") == origin]
    assert len(cases) >= 45
    errors = [error for error in map(MISREAD[task], cases) if error is not None]
    assert len(errors) <= MAX_ERRORS * len(cases), "\n".join(errors)


def test_the_corpus_has_no_case_twice():
    texts = Counter(json.dumps(case, sort_keys=True) for cases in CASES.values() for case in cases)
    assert max(texts.values()) == 1


def test_every_letter_is_read_equally_often():
    counts = Counter()
    for case in CASES["letter_symmetry"]:
        counts.update(
            letter for filled, letter in letters_of(case["template"], case["options"]).items() if letter == filled
        )
    assert len(counts) == 4
    assert min(counts.values()) >= (1 - MAX_ERRORS) * max(counts.values())


LONE_LETTER = re.compile(r"(?<![a-zA-Z0-9\u00c0-\u024f])[A-D](?![a-zA-Z0-9\u00c0-\u024f]|'[a-z])")


def turned(letter: str, turn: int) -> str:
    return "ABCD"[("ABCD".index(letter) + turn) % 4]


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_letters_in_other_places_are_read_alike(turn):
    """Where all letters of text and options are turned, A to B and so on, so is what is read."""
    cases = [case for case in CASES["multiple_choice"] if case["options"] == CASES["letter_symmetry"][0]["options"]]
    texts = [unicodedata.normalize("NFKC", case["answer_text"]) for case in cases]
    # An "A" before another word may be the article, which does not turn; small letters are not turned either.
    fixed = re.compile(r"\bA \w|\b[a-d]\b|\bQ:.*\bA:")  # nor does the "A:" of an answer to "Q:"
    kept = [(case, text) for case, text in zip(cases, texts, strict=True) if not fixed.search(text)]
    assert len(kept) > 400
    errors = []
    for case, plain in kept:
        letter = chosen_option(plain, case["options"])
        text = LONE_LETTER.sub(lambda match: turned(match[0], turn), plain)
        options = {turned(label, turn): wording for label, wording in case["options"].items()}
        if chosen_option(text, dict(sorted(options.items()))) != (letter and turned(letter, turn)):
            errors.append((plain, text))
    assert errors == []


WRAPPERS = (
    "**{}**", "`{}`", r"\boxed{{{}}}", "$\\text{{{}}}$", '{{"answer": "{}"}}', "<b>{}</b>", '"{}"', "  {}\n",
    "```\n{}\n```", "Answer: {}", "The answer is: {}", "### Final answer\n{}", "> {}", "{}<|im_end|>",
)  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_only_lays_an_answer_out_changes_nothing(wrapper):
    errors = []
    for case in CASES["multiple_choice"][::4]:
        text, options = case["answer_text"], case["options"]
        if chosen_option(wrapper.format(text), options) != chosen_option(text, options):
            errors.append(text)
    assert len(errors) <= MAX_ERRORS * len(CASES["multiple_choice"][::4]), errors
