"""The rule of MMMU (arXiv:2311.16502) for answers without options, which VideoMMMU is scored by (lmms-eval's port)."""

from __future__ import annotations

import re

from longrl.evaluation.benchmark_rules import lmms_eval_option
from longrl.rewards.answers import after_thinking
from longrl.types import Completion, Row

LEADS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total ", "total ",
    "identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as ",
    "found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has ",
)  # fmt: skip
"""Words behind the last of which, of each, a sentence's answer may stand; the shortest such rest counts."""
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def video_mmmu_score(completion: Completion, row: Row) -> float:
    """Score of VideoMMMU (arXiv:2501.13826): lmms-eval's letter, or of an open answer MMMU's rule.

    A text is right where the reference is part of one of the answer's claims, a number where a claim holds it, to two
    decimals.
    """
    if row.task == "multiple_choice":
        return lmms_eval_option(completion, row)
    text = after_thinking(completion.text)
    golds = _normalized(row.answer)
    for claim in _claims(text) if text else ():
        for gold in golds:
            if isinstance(claim, str) and isinstance(gold, str) and gold in claim:
                return 1.0
            if isinstance(claim, float) and claim == gold:
                return 1.0
    return 0.0


def _claims(text: str) -> set[str | float]:
    """What an answer may mean: the rests of its sentences behind a lead, and the numbers in them."""
    # A capital begins a sentence, and there is none once the text is in small letters: lines alone are told apart.
    lines = text.strip().strip(".").lower().split("\n")
    rests = []
    for place, line in enumerate(lines):
        leads = (*LEADS, "=") if place == len(lines) - 1 else LEADS
        found = [line.rsplit(lead, 1)[-1].strip() for lead in leads if lead in line]
        # As released: an empty rest gives way to the next one, and is beaten by none shorter.
        shortest = ""
        for rest in found:
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in TRIVIAL:
            rests.append(shortest)
    rests = rests or [text]
    numbers = [number for rest in rests for pattern in NUMBERS for number in re.findall(pattern, rest)]
    return {claim for said in (*rests, *numbers) for claim in _normalized(said)}


def _normalized(text: str) -> list[str | float]:
    """A number, to two decimals, or a text in small letters; one letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
