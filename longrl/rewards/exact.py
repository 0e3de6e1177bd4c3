"""Short texts: equal after normalising."""

from __future__ import annotations

import re
import unicodedata

from longrl.rewards.answers import lenient_text, strict_text
from longrl.types import Completion, Row


def exact(completion: Completion, row: Row) -> float:
    """1.0 when the content of `<answer>` is `row.answer`, or one of `row.metadata["aliases"]`, after normalising."""
    return _is_equal(strict_text(completion.text), row)


def exact_lenient(completion: Completion, row: Row) -> float:
    """As `exact`; without an `<answer>` the text after the thinking is compared instead."""
    return _is_equal(lenient_text(completion.text), row)


def normalized_text(text: str) -> str:
    """Lower-case words without punctuation and articles, single-spaced; "The  Cat!" and "cat" are equal.

    A text that normalises to nothing ("a", "-", an emoji) is kept as it is, only stripped and lower-cased.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\d+(?:[.,]\d+)+|\w+", folded)  # 3.5 stays one word
    return " ".join(word for word in words if word not in ("a", "an", "the")) or folded.strip()


MAX_EXACT_CHARS = 2000
"""A longer text is equal to none, unless an accepted one is about as long."""


def _is_equal(text: str, row: Row) -> float:
    accepted = (row.answer, *row.metadata.get("aliases", ()))
    if len(text) > max(MAX_EXACT_CHARS, 4 * max(map(len, accepted))):
        return 0.0
    return float(bool(text) and normalized_text(text) in {normalized_text(answer) for answer in accepted})
