"""What a completion answers: its form, where its answer stands, and whether that settles on the right option."""

from __future__ import annotations

import re

from longrl.rewards.option_choice import chosen_option
from longrl.rewards.options import parse_options
from longrl.types import Completion, Row


def multiple_choice(completion: Completion, row: Row) -> float:
    r"""1.0 when the content of `<answer>` settles on the option `row.answer`, else 0.0.

    An answer that stands elsewhere, `\boxed{B}` without the tag too, earns nothing: it is for
    `multiple_choice_lenient`. Of an answer of more than 4000 characters both ends are read.
    """
    return _is_right(strict_text(completion.text), row)


def multiple_choice_lenient(completion: Completion, row: Row) -> float:
    """As `multiple_choice`; without an `<answer>` the text after the thinking is read instead."""
    return _is_right(lenient_text(completion.text), row)


def _is_right(text: str, row: Row) -> float:
    return float(bool(text) and chosen_option(text, parse_options(row.problem)) == row.answer.strip().upper())


# ---- the form of a completion, and where its answer stands ----

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_OPEN_ANSWER = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_CLOSE_ANSWER = re.compile(r"<\s*/\s*answer\s*>", re.IGNORECASE)
_OPEN_THINK = re.compile(r"<\s*think\s*>", re.IGNORECASE)
_CLOSE_THINK = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)


def think_answer_format(completion: Completion, row: Row) -> float:
    r"""1.0 when the text is one `<think>..</think>`, then one `<answer>..</answer>`, both with content, else 0.0.

    Example:
        `<think>He pours tea.</think>\n<answer>B</answer>` has the form; a word before, between or after the two
        blocks, a repeated tag or a blank block breaks it.
    """
    text = completion.text
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    match = _THINK_ANSWER.fullmatch(text)
    return float(match is not None and all(part.strip() for part in match.groups()))


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: the text itself when it has no think tag, "" when the thinking never ended."""
    closing = list(_CLOSE_THINK.finditer(text))
    if closing:
        return text[closing[-1].end() :]
    opening = _OPEN_THINK.search(text)
    return text[: opening.start()] if opening else text


def answer_text(text: str) -> str | None:
    """Content of the last closed `<answer>..</answer>`, stripped; None when there is none.

    An answer inside finished thinking does not count. When the thinking was never closed the whole text is searched,
    for a model that forgot `</think>` has still answered.
    """
    place = answer_place(text)
    if place is None:
        return None
    return _CLOSE_ANSWER.sub(" ", text[slice(*place)]).strip() or None


def answer_place(text: str) -> tuple[int, int] | None:
    """Where in the text the content of `answer_text` begins and ends, without white space around it."""
    thinking_end = max((match.end() for match in _CLOSE_THINK.finditer(text)), default=0)
    closing = list(_CLOSE_ANSWER.finditer(text, thinking_end))
    if not closing:
        return None
    stop = closing[-1].start()
    opening = list(_OPEN_ANSWER.finditer(text, thinking_end, stop))
    if not opening:
        return None
    content = text[opening[-1].end() : stop]
    if not content.strip():
        return None
    start = stop - len(content.lstrip())
    return start, start + len(content.strip())


def strict_text(text: str) -> str:
    """What a strict score reads: the `<answer>` content, "" without one."""
    return answer_text(text) or ""


def lenient_text(text: str) -> str:
    """What a lenient score reads: the `<answer>` content, else all that follows the thinking."""
    return answer_text(text) or after_thinking(text).strip()
