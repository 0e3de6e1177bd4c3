"""samples.jsonl: a line per question and condition, with the fields of lmms-eval and what decided the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.evaluation.outcomes import Outcome, video_name
from longrl.io.jsonl import read_jsonl

if TYPE_CHECKING:
    from longrl.evaluation.answering import Answer
    from longrl.types import Row

Line = dict[str, Any]
FILE = "samples.jsonl"
ONE_EACH = ("sample", "correct", "correct_lenient", "format", "letter", "finish_reason")
"""Fields of a record that a line holds as a list, one value for each completion."""


def sample_lines(
    outcome: Outcome,
    rows: Sequence[Row],
    hashes: Sequence[str],
    answers: Mapping[int, Answer],
    asked: Mapping[str, Any],
) -> Iterator[Line]:
    """The lines of a condition, in the order of the rows.

    `doc_id`, `doc_hash`, `input`, `target`, `resps` and `filtered_resps` are named as lmms-eval names them.

    Args:
        outcome: of the condition.
        rows: all questions.
        hashes: `doc_hash` of each.
        answers: by the number of their row.
        asked: what is the same in all lines: model, sampling and so on.
    """
    for index, (row, digest) in enumerate(zip(rows, hashes, strict=True)):
        line = {"condition": outcome.name, "doc_id": index, "doc_hash": digest, "id": row.id, **_question(row)}
        if index in outcome.failures:
            yield {**line, "error": outcome.failures[index], **asked}
        else:
            yield {**line, "error": None, **_said(outcome.records[index]), **_shown(answers[index]), **asked}


def _question(row: Row) -> Line:
    return {"task": row.task, "category": row.category, "video_id": video_name(row), "target": row.answer}


def _said(records: Sequence[Mapping[str, Any]]) -> Line:
    listed = {name: [record[name] for record in records] for name in ONE_EACH}
    count = len(records)
    return {
        "breakdowns": records[0]["breakdowns"],
        "resps": [[record["prediction"] for record in records]],
        "filtered_resps": [record["letter"] or record["prediction_answer"] for record in records],
        "strict_accuracy": sum(record["correct"] for record in records) / count,
        "robust_accuracy": sum(record["correct_lenient"] for record in records) / count,
        "rewards": [record["rewards"] for record in records],
        **listed,
    }


def _shown(answer: Answer) -> Line:
    return {
        "input": answer.input,
        "prompt_hash": answer.prompt_hash,
        "frame_indices": answer.frame_indices,
        "timestamps": answer.frame_times,
        "num_frames": sum(map(len, answer.frame_indices)),
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_media_tokens": answer.num_media_tokens,
        "num_completion_tokens": answer.num_completion_tokens,
        "finish_reason_of_engine": answer.finish_reasons,
    }


def records_of(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scored fields of a line, as records; none of a question without an answer."""
    if line["error"] is not None:
        return []
    shared = {
        "id": line["id"],
        "task": line["task"],
        "category": line["category"],
        "breakdowns": line["breakdowns"],
        "video": line["video_id"],
        "answer": line["target"],
    }
    count = len(line["correct"])
    return [{**shared, **{name: line[name][n] for name in ONE_EACH}} for n in range(count)]


def read_samples(folder: str | Path) -> dict[str, list[Line]]:
    """The lines of each condition of an evaluation."""
    conditions: dict[str, list[Line]] = {}
    for line in read_jsonl(Path(folder) / FILE):
        conditions.setdefault(line["condition"], []).append(line)
    return conditions
