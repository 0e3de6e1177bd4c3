"""Answer, think, answer again: the rewards of VideoAuto-R1 (arXiv:2601.05175) for the first answer and the form.

    <answer>B</answer><think>He pours tea.</think><answer>C</answer>

The second answer is what `longrl.rewards.accuracy` reads of such a text. A policy that cannot tell yet may say so in
the first place. The paper writes answers in boxes; here they stand in the tags that all judges of longrl read.
"""

from __future__ import annotations

import re
from dataclasses import replace

from longrl.rewards.answers import answer_text
from longrl.rewards.reward_sum import RULE_TASKS, accuracy
from longrl.types import Completion, Row

UNDECIDED = "let's analyze"
"""How a first answer begins that leaves it to the thinking."""
RIGHT_ABOVE = 0.7
"""Of a second answer, from where leaving the first open pays, as in the authors' code."""
_TAGS = ("<think>", "</think>")
_FORM = re.compile(
    r"\s*<answer>(?P<first>.*?)</answer>\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<second>.*?)</answer>\s*",
    re.DOTALL,
)


def answer_twice_format(completion: Completion, row: Row) -> float:
    """1.0 when the text is one answer, thinking, and one answer, all with content, else 0.0."""
    text = completion.text
    if any(text.count(tag) != 1 for tag in _TAGS) or text.count("<answer>") != 2 or text.count("</answer>") != 2:
        return 0.0
    match = _FORM.fullmatch(text)
    return float(match is not None and all(part.strip() for part in match.groups()))


def first_answer(completion: Completion, row: Row) -> float:
    """How right the answer before the thinking is, judged as `accuracy` judges the second."""
    return accuracy(replace(completion, text=_before_thinking(completion.text)), row)


def open_first(completion: Completion, row: Row) -> float:
    """1.0 where the second answer is right and the first has left it to the thinking, else 0.0.

    A first answer that is open earns nothing as an answer; this is what it earns instead, less than a right one would.
    """
    first = answer_text(_before_thinking(completion.text)) or ""
    is_open = first.lower().startswith(UNDECIDED)
    return float(is_open and accuracy(completion, row) > RIGHT_ABOVE)


for _function in (first_answer, open_first):
    vars(_function)["tasks"] = RULE_TASKS  # see `RewardTerm.tasks`


def _before_thinking(text: str) -> str:
    return text.partition("<think>")[0]
