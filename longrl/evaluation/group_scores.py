"""Scores of groups of questions, as released evaluation code has them (`protocol.groups.score`)."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from longrl.types import Row

GROUP_SIZE = 4
CHAINS: dict[str, tuple[float, ...]] = {
    "[1, 2, 3, 4]": (0, 1 / 16, 4 / 16, 9 / 16, 1),
    "[1, [2, 3], 4]": (0, 1 / 12, 4 / 12, 7 / 12, 1),
    "[[1, 2], 3, 4]": (0, 1 / 10, 2 / 10, 5 / 10, 1),
}
"""Structure of a chain of reasoning, whose bracketed steps need no order -> its score by the steps that hold."""
CONSISTENT = (0, 1 / 16, 4 / 16, 9 / 16, 1)
"""Score of questions on one ability by how many are right: the square of their share."""


def video_mme_v2(rows: Sequence[Row], correct: Sequence[float]) -> float:
    """Score of a group of Video-MME-v2 (arXiv:2604.05015, `evaluation/test_video_mme_v2.py`), in [0, 1].

    `group_type` of the metadata is `relevance`, four questions on one ability, of which the number of right answers
    counts; or `logic`, steps of a reasoning, of which those before the first wrong answer count. Of two steps in
    brackets (`group_structure`) the second holds without the first one, as the released code has it: it counts as one
    step then, and what follows it does not.

    Args:
        rows: the four questions in their order.
        correct: 1.0 for a right answer to each.

    Raises:
        ValueError: not four questions, or a type or structure that is none of these.
    """
    if len(rows) != GROUP_SIZE:
        raise ValueError(f"a group has {GROUP_SIZE} questions, got {len(rows)}: {', '.join(row.id for row in rows)}")
    right = [value >= 0.5 for value in correct]
    about = rows[-1].metadata
    kind = about.get("group_type")
    if kind == "relevance":
        return float(CONSISTENT[sum(right)])
    if kind != "logic":
        raise ValueError(f"row {rows[-1].id!r}: group_type must be relevance or logic, got {kind!r}; correct it")
    structure = _structure(about.get("group_structure"), rows[-1].id)
    steps = [*right, False].index(False)
    if structure == "[1, [2, 3], 4]" and steps == 1:
        steps += right[2]
    if structure == "[[1, 2], 3, 4]" and steps == 0:
        steps += right[1]
    return float(CHAINS[structure][steps])


def _structure(given: object, row_id: str) -> str:
    """The structure of a chain as `CHAINS` spells it; released as text."""
    try:
        structure = str(ast.literal_eval(given) if isinstance(given, str) else given)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        structure = str(given)
    if structure not in CHAINS:
        raise ValueError(f"row {row_id!r}: group_structure must be one of {', '.join(CHAINS)}, got {given!r}")
    return structure
