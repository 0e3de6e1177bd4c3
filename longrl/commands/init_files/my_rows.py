"""How a record of yours becomes a question: `data.row_function: my_rows.py:to_row` in sft.yaml and rl.yaml.

`longrl.datamodules.rows.canonical_row` reads records like those in questions.jsonl:

    id            any name; the record's number where it is missing
    video         a path from data.media_root on, or a list of paths; `image` likewise
    question      text
    options       a list of wordings; left out for open questions
    answer        an option's letter, its wording, or its place, counted from 0; else a number or a text
    reasoning     what SFT teaches before the answer; may be missing
    problem_type  the category in tables of results; may be missing
"""

from typing import Any

from longrl.datamodules.rows import canonical_row
from longrl.types import Row


def to_row(record: dict[str, Any], index: int, media_root: str | None) -> Row:
    """One record as a `Row`: rename the fields on the right to those of your records.

    Args:
        record: one line of the file.
        index: its number, from 0.
        media_root: folder that relative video paths start in.

    Raises:
        ValueError: a field is missing.
    """
    fields = {
        "id": record.get("id"),
        "video": record.get("video"),
        "question": record.get("question"),
        "options": record.get("options"),
        "answer": record.get("answer"),
        "reasoning": record.get("reasoning"),
        "problem_type": record.get("problem_type"),
    }
    return canonical_row(fields, index, media_root)
