"""A judge in the words of a published benchmark, and what its replies say.

The wordings are in configs (`configs/reward/activitynet_qa.yaml`, `mmvu.yaml`); a verdict is a function of a reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from longrl.chat.endpoint import Reply, Request
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.rewards.answers import lenient_text
from longrl.rewards.judge import SCORE, SCORE_FORM, Judge, JudgementFailed
from longrl.types import Completion, Row

PRED = re.compile(r"""['"]pred['"]\s*:\s*['"]([^'"]*)""")
SCORE_OF_FIVE = re.compile(r"""['"]score['"]\s*:\s*['"]?([0-5])(?:\.\d*)?(?![\d.])""")
CORRECT = re.compile(r"""['"]correct['"]\s*:\s*['"]?(true|false)\b""", re.IGNORECASE)
"""Of each the last in a reply counts: a judge may think aloud before."""


def yes_or_no(reply: str) -> float:
    """1.0 for a dictionary whose `pred` says yes, 0.0 for no: accuracy as Video-ChatGPT counts it (arXiv:2306.05424).

    Raises:
        JudgementFailed: it says neither.
    """
    said = (PRED.findall(reply) or [""])[-1].lower()
    if "yes" in said:
        return 1.0
    if "no" in said:
        return 0.0
    raise JudgementFailed(f"the judge's reply must say {{'pred': 'yes'}} or 'no', got {reply[-200:]!r}")


def score_of_five(reply: str) -> float:
    """A fifth of the `score` of the same dictionary, which is cut to a whole number from 0 to 5.

    Raises:
        JudgementFailed: it has none.
    """
    return int(_last(SCORE_OF_FIVE, reply, "a 'score' from 0 to 5")) / 5


def correct_flag(reply: str) -> float:
    """1.0 for a JSON object whose `correct` is true, 0.0 for false: MMVU (arXiv:2501.12380).

    Raises:
        JudgementFailed: it has none.
    """
    return float(_last(CORRECT, reply, '"correct": true or false').lower() == "true")


def _last(pattern: re.Pattern[str], reply: str, wanted: str) -> str:
    found: list[str] = pattern.findall(reply)
    if not found:
        raise JudgementFailed(f"the judge's reply must have {wanted}, got {reply[-200:]!r}")
    return found[-1]


def score_line(reply: str) -> float:
    """The number from 0 to 1 of the last "SCORE: 0.7" in a reply, for judges in longrl's own words.

    Raises:
        JudgementFailed: it has none.
    """
    found = SCORE.findall(reply)
    if not found or float(found[-1]) > 1.0:
        raise JudgementFailed(f"the judge's reply has no score; wanted is {SCORE_FORM}, got {reply[-200:]!r}")
    return float(found[-1])


@dataclass(frozen=True)
class PublishedJudge(Judge):
    """How right an answer is by a benchmark's own judge: its instructions, by kind of question, and its verdict.

    It is shown the `<answer>`, or all that follows the thinking where there is no tag: what a benchmark's own wording
    asks for has none.
    """

    systems: Mapping[str, str] = field(default_factory=dict)
    """`Row.task` -> the system message of its judge; rows of other tasks are judged by their rule."""
    verdict: FunctionOrPath[Callable[[str], float]] = yes_or_no
    """What a reply says, in [0, 1]: a function of its text, or its import path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.systems:
            raise ValueError(
                "systems of a PublishedJudge must name a task and its instructions, got none; "
                "configs/reward/activitynet_qa.yaml has an example"
            )
        object.__setattr__(self, "verdict", resolve_function(self.verdict, "verdict of a PublishedJudge", ("reply",)))

    @property
    def reply_form(self) -> str:
        """What a reply must be."""
        return "the form that the instructions say, and nothing else"

    def judges(self, row: Row) -> bool:
        """True for a row whose task has instructions."""
        return row.task in self.systems

    def answer_in(self, completion: Completion) -> str:
        """The answer with its tag or without one."""
        return lenient_text(completion.text)

    def request(self, row: Row, answer: str) -> Request:
        """The request about an answer, behind its task's system message; the metadata may word the question for it."""
        asked = super().request(replace(row, problem=str(row.metadata.get("asked_of_judge", row.problem))), answer)
        return replace(asked, messages=({"role": "system", "content": self.systems[row.task]}, *asked.messages))

    def value_of(self, reply: Reply) -> float:
        """The verdict of a reply; raises JudgementFailed for a refusal, or for one without."""
        if reply.refusal is not None or reply.finish_reason == "content_filter":
            raise JudgementFailed(f"the judge refused: {reply.refusal or reply.text[:200]!r}")
        return self.verdict(reply.text)
