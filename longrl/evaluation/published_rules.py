"""Scoring rules of released evaluation code, as a second score beside ours (`protocol.rule`).

They are stated as they are, quirks included, so that a number can be compared with a published one: each reads less, or
more, than the strict and robust scores do, and docs/protocols.md says where. All are functions `(completion, row)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from longrl.rewards.answers import after_thinking
from longrl.rewards.options import parse_options
from longrl.types import Completion, Row

LETTERS = "ABCD"
STRIPPED = ",.!?;:'\""
"""Marks that lmms-eval takes off both ends, one after the other."""
FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
"""How lmms-eval knows a letter anywhere in a text, and how much it trusts each."""
START, END, PHRASE = 10, 9, 7
PHRASES = (
    *(f"{lead}{word} is" for word in ("answer", "option", "choice") for lead in ("the correct ", "correct ")),
    *(f"{lead}{word} is" for word in ("answer", "option") for lead in ("the best ", "best ")),
    *(f"{lead}{word} is" for word in ("answer", "choice") for lead in ("the ", "", "my ")),
    "i choose", "i select", "i pick",
    "\uc635\uc158", "\uc815\ub2f5\uc740", "\ub2f5\uc740", "\ub2f5:",  # Korean: option, the answer is, answer is
    "\u7b54\u6848\u662f", "\u7b54\u6848\u4e3a", "\u9009",  # Chinese: the answer is, choose
    "\u7b54\u3048\u306f",  # Japanese: the answer is
)  # fmt: skip
"""Words behind the first of which, of each, lmms-eval looks for letters."""
QWEN_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
QWEN_REFUSALS = (
    "Failed to obtain answer via API", "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
LONG_RL_OPEN, LONG_RL_CLOSE = "<answer>", "</answer>"
LONG_RL_LEAD = "Therefore the final answer is:"


def lmms_eval_letter(completion: Completion, row: Row) -> float:
    """1.0 if the letter that lmms-eval reads is the answer (`mcq_extract.py`, which VideoMME uses).

    A letter at the start counts first, then one at the end, after "answer is", in brackets, before a stop, and so on;
    of equal ones the last. Any capital A to D may be meant, also the article: "A dog" is option A.
    """
    return float(lmms_eval_choice(after_thinking(completion.text)) == row.answer)


def lmms_eval_choice(text: str, letters: Iterable[str] = LETTERS) -> str:
    """The letter that lmms-eval reads in an answer without its thinking, "" for none.

    Args:
        text: the answer.
        letters: of the options.
    """
    letters = tuple(letters)
    text = text.strip()
    for mark in STRIPPED:
        text = text.strip(mark)
    padded = f" {text} "
    bare = padded.strip()
    found: list[tuple[int, int, str]] = []  # trust, place, letter
    for letter in letters:
        found += [(trust, padded.rfind(form.format(letter)), letter) for trust, form in FORMS]
        found += [(PHRASE, padded.find(letter, end), letter) for end in _phrase_ends(padded.lower())]
        if re.match(rf"{letter}(?![^\W\d_])", bare):
            found.append((START, 0, letter))
        if re.search(rf"(?<![^\W\d_]){letter}\Z", bare):
            found.append((END, len(padded) - 1, letter))
    found = [one for one in found if one[1] >= 0] or [(0, padded.rfind(letter), letter) for letter in letters]
    _, place, letter = max(found, key=lambda one: one[:2])
    return letter if place >= 0 else ""


def _phrase_ends(text: str) -> Iterable[int]:
    """Where the first of each phrase ends."""
    return (text.find(phrase) + len(phrase) for phrase in PHRASES if phrase in text)


def long_rl_exact_letter(completion: Completion, row: Row) -> float:
    """1.0 if what stands in the first `<answer>` is the answer to the letter, or without a tag the whole text is.

    As Long-RL's `eval/eval.py` (arXiv:2507.07966), whose symbolic comparison before it (math_verify) settles no letter:
    "B." and "B. a dog" are wrong there, and so is an answer over two lines.
    """
    text = completion.text
    opening = f"{LONG_RL_OPEN}{LONG_RL_LEAD} " if LONG_RL_LEAD in text else LONG_RL_OPEN
    found = (_between(line, opening, LONG_RL_CLOSE) for line in text.split("\n"))
    answer = next((content for content in found if content is not None), text)
    return float(answer.strip() == row.answer.strip())


def _between(line: str, opening: str, closing: str) -> str | None:
    """What stands between the first opening and the next closing; None without both."""
    _, opened, rest = line.partition(opening)
    content, closed, _ = rest.partition(closing)
    return content if opened and closed else None


def qwen_option(completion: Completion, row: Row) -> float:
    """1.0 if the option that Qwen's VideoMME rule reads is the answer (Qwen3-VL, `evaluation/VideoMME/eval_utils.py`).

    One letter as a word of its own, or else one option's wording within the text. What the rule leaves open the
    released code asks a judge model, GPT-3.5 by default; here it counts as wrong.
    """
    answer = completion.text.rpartition("</think>")[2].strip()
    return float(qwen_choice(answer, parse_options(row.problem)) == row.answer)


def qwen_choice(text: str, options: dict[str, str]) -> str | None:
    """The option that Qwen's rule reads in an answer without its thinking; None where it leaves that open.

    Args:
        text: the answer.
        options: letter -> wording.
    """
    if any(refusal in text for refusal in QWEN_REFUSALS):
        return None
    words = text.translate(QWEN_MARKS).split()
    named = [letter for letter in options if letter in words]
    is_article = "A" in words and len(words) > 3
    if len(named) == 1 and not is_article:
        return named[0]
    if not named and "Z" in words:  # what its judge says for "none"
        return None
    worded = [letter for letter, wording in options.items() if wording.lower() in text.lower()]
    return worded[0] if len(worded) == 1 else None
