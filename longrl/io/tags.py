"""`<tag>..</tag>` in texts of strangers, in linear time: a regular expression looks to the end from every tag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Tagged(NamedTuple):
    """A part of a text between a tag and the next one that closes it."""

    start: int
    """Of the opening tag."""
    end: int
    """Behind the closing one."""
    content: str


def tagged_parts(text: str, tag: str) -> Iterator[Tagged]:
    """Parts of a text within a tag of this name, in capitals or not, in order; what is never closed is none.

    Example:
        `tagged_parts("<answer>A</answer>", "answer")` gives `Tagged(0, 18, "A")`.
    """
    is_open = None
    for match in re.finditer(rf"<(/?){re.escape(tag)}>", text, re.IGNORECASE):
        if is_open is None and not match[1]:
            is_open = match
        elif is_open is not None and match[1]:
            yield Tagged(is_open.start(), match.end(), text[is_open.end() : match.start()])
            is_open = None


def without_tagged(text: str, tag: str) -> str:
    """A text without the parts within a tag, and without these tags."""
    kept = []
    last = 0
    for part in tagged_parts(text, tag):
        kept.append(text[last : part.start])
        last = part.end
    return "".join([*kept, text[last:]])
