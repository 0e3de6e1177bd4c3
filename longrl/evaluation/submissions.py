"""Files for servers that know the answers of hidden splits (`protocol.submission`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.io.atomic import atomic_write
from longrl.rewards.answers import lenient_text
from longrl.rewards.option_choice import chosen_option
from longrl.rewards.options import parse_options
from longrl.types import Row

if TYPE_CHECKING:
    from longrl.evaluation.outcomes import Outcome
    from longrl.evaluation.protocol import SubmissionForm

UNREAD = -1
"""Option of an answer that names none; servers count it as wrong or invalid."""


def write_submission(folder: Path, form: SubmissionForm, rows: Sequence[Row], outcome: Outcome) -> Path:
    """Writes what a server wants: `submission.json`, or of a condition other than the video `submission_NAME.json`."""
    answers = [outcome.answers[index].texts[0] if index in outcome.answers else None for index in range(len(rows))]
    name = "" if outcome.name == "video" else "_" + re.sub(r"\W+", "_", outcome.name.lower())
    text = json.dumps(form(rows, answers), indent=2, ensure_ascii=False)
    return atomic_write(folder / f"submission{name}.json", text + "\n")


def egoschema(rows: Sequence[Row], answers: Sequence[str | None]) -> dict[str, int]:
    """{question uid: index of the option from 0 on}, as EgoSchema's server takes it (`validate.py`)."""
    return {row.id: _option_number(row, answer) for row, answer in zip(rows, answers, strict=True)}


def longvideobench(rows: Sequence[Row], answers: Sequence[str | None]) -> dict[str, str]:
    """{question id: what was answered}, as lmms-eval writes it for LongVideoBench's leaderboard."""
    return {row.id: answer or "" for row, answer in zip(rows, answers, strict=True)}


def mlvu(rows: Sequence[Row], answers: Sequence[str | None]) -> list[dict[str, Any]]:
    """`question_id`, `question_type` and `option` of each question, as MLVU's `test_res.json`."""
    return [
        {"question_id": row.id, "question_type": row.category, "option": _letter(row, answer) or ""}
        for row, answer in zip(rows, answers, strict=True)
    ]


def _option_number(row: Row, answer: str | None) -> int:
    letter = _letter(row, answer)
    return UNREAD if letter is None else list(parse_options(row.problem)).index(letter)


def _letter(row: Row, answer: str | None) -> str | None:
    """The option that an answer names, read as the robust score reads it."""
    return None if answer is None else chosen_option(lenient_text(answer), parse_options(row.problem))
