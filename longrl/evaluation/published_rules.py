"""Scoring rules of released evaluation code, as a second score beside ours (`protocol.rule`).

They are stated as they are, quirks included, so that a number can be compared with a published one: each reads less, or
more, than the strict and robust scores do, and docs/protocols.md says where. All are functions `(completion, row)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from longrl.rewards.options import parse_options
from longrl.types import Completion, Row

LETTERS = "ABCD"
REASONING_TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
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
VLMEVALKIT_LEADS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option isThe correct option is", "Best answer:Best option:",  # two of its lines lack a comma each
    "Answer:", "Option:",
)  # fmt: skip
"""Words that VLMEvalKit takes out of an answer, one after the other, before it looks for a capital."""
VLMEVALKIT_PHRASE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
VLMEVALKIT_LAST_WORDS = 5
"""A letter counts as a word of its own among so many of the last."""
LONG_RL_OPEN, LONG_RL_CLOSE = "<answer>", "</answer>"
LONG_RL_LEAD = "Therefore the final answer is:"


def lmms_eval_letter(completion: Completion, row: Row) -> float:
    """1.0 if the letter that lmms-eval reads is the answer (`mcq_extract.py`, which VideoMME uses).

    A letter at the start counts first, then one at the end, after "answer is", in brackets, before a stop, and so on;
    of equal ones the last. Any capital A to D may be meant, also the article: "A dog" is option A.
    """
    return float(lmms_eval_choice(without_reasoning(completion.text)) == row.answer)


def without_reasoning(text: str) -> str:
    """An answer without what lmms-eval takes for reasoning by default; thinking that never ended stays."""
    for opening, closing in REASONING_TAGS:
        before, opened, rest = text.partition(opening)
        while opened and closing in rest:
            text = before + rest.partition(closing)[2]
            before, opened, rest = text.partition(opening)
        if not opened:  # the prompt did that, if anything did
            text = text.rpartition(closing)[2]
    return text.strip()


def vlmevalkit_letter(completion: Completion, row: Row) -> float:
    """1.0 if the letter that VLMEvalKit reads is the answer (`extract_characters_regex`; Video-MME, LongVideoBench).

    The first capital A to D anywhere, thinking included, once "The answer is" and the like are out of the text: "A dog"
    is option A, and so is "I think it is Bright because" option B. What has none is wrong, with `exact_matching`.
    """
    return float(vlmevalkit_capital(completion.text) == row.answer)


def vlmevalkit_capital(text: str) -> str:
    """The letter that VLMEvalKit reads in an answer to Video-MME, "" for none."""
    text = text.strip()
    for lead in VLMEVALKIT_LEADS:
        text = text.replace(lead, "")
    return next((letter for letter in text if letter in LETTERS), "")


def vlmevalkit_option(completion: Completion, row: Row) -> float:
    """1.0 if the option that VLMEvalKit reads is the answer (`can_infer`; its other multiple-choice sets).

    What it cannot read it asks a judge model, by default; here, as with its `exact_matching`, that is wrong.
    """
    return float(vlmevalkit_choice(completion.text, parse_options(row.problem)) == row.answer)


def vlmevalkit_choice(text: str, options: dict[str, str]) -> str | None:
    """The option that VLMEvalKit reads in an answer, None where it would ask a judge.

    A letter that is a word of its own among the last five, if no other letter is a word; else the one behind "answer
    is", small ones too; else the only option whose wording the text has, if it is not much longer than all of them.

    Args:
        text: the answer, its thinking included.
        options: letter -> wording.
    """
    if any(refusal in text for refusal in QWEN_REFUSALS[1:]):
        return None
    failed = QWEN_REFUSALS[0] in text
    words = text.translate(QWEN_MARKS).split()
    named = [letter for letter in options if letter in words]
    if not failed and len(named) == 1 and words.index(named[0]) > len(words) - VLMEVALKIT_LAST_WORDS:
        return named[0]
    if not failed and not named and "Z" in words:
        return None
    phrase = None if failed else VLMEVALKIT_PHRASE.search(text)
    if phrase and phrase[1].upper() in options:
        return phrase[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    worded = [letter for letter, wording in options.items() if wording.lower() in text.lower()]
    return worded[0] if len(worded) == 1 else None


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
