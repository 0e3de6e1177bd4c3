"""samples.jsonl: a line per question and condition, with the fields of lmms-eval and what decided the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl.evaluation.answering import doc_hash
from longrl.evaluation.outcomes import Outcome
from longrl.evaluation.records import Record, video_name
from longrl.evaluation.scores import RULE, mean_of
from longrl.io.jsonl import read_jsonl
from longrl.types import Row

SampleLine = dict[str, Any]
SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
TEST_FOLDER = "test"
"""Folder in a run's where `test` leaves its files."""
PREDICT_FOLDER = "predict"
"""Folder in a run's where `predict` leaves its answers."""
PER_COMPLETION = (
    "sample", "correct", "correct_lenient", "correct_by_rule", "accuracy_by_rule", "accuracy", "accuracy_lenient",
    "format", "letter", "finish_reason", "rewards", "reward",
)  # fmt: skip
"""Fields of a record that a line holds as a list, one value for each completion."""


def sample_lines(outcome: Outcome, rows: Sequence[Row], shared: Mapping[str, Any]) -> Iterator[SampleLine]:
    """The lines of a condition, in the order of the rows.

    `doc_id`, `doc_hash`, `input`, `target`, `resps` and `filtered_resps` are named as lmms-eval names them.

    Args:
        outcome: of the condition.
        rows: all questions; those that nobody asked have no line.
        shared: what is the same in all lines: model, sampling and so on.
    """
    for index in sorted(outcome.records.keys() | outcome.failures.keys()):
        row = rows[index]
        line = {
            "condition": outcome.name,
            "doc_id": index,
            "doc_hash": doc_hash(row),
            "id": row.id,
            "task": row.task,
            "category": row.category,
            "video_id": video_name(row),
            "target": row.answer,
            "error": outcome.failures.get(index),
        }
        if index in outcome.records:
            answer = outcome.answers[index]
            records = outcome.records[index]
            is_judged = index not in outcome.failures
            line |= {
                "breakdowns": records[0]["breakdowns"],
                "resps": [[record["prediction"] for record in records]],
                "filtered_resps": [record["letter"] or record["prediction_answer"] for record in records],
                "strict_accuracy": mean_of(records, "correct") if is_judged else None,
                "robust_accuracy": mean_of(records, "correct_lenient") if is_judged else None,
                **{name: [record[name] for record in records] for name in PER_COMPLETION if name in records[0]},
                "input": answer.input,
                "prompt_hash": answer.prompt_hash,
                "frame_indices": answer.frame_indices,
                "timestamps": answer.frame_times,
                "num_frames": sum(map(len, answer.frame_indices)),
                "num_prompt_tokens": answer.num_prompt_tokens,
                "num_media_tokens": answer.num_media_tokens,
                "num_completion_tokens": answer.num_completion_tokens,
                "costs": answer.costs,
                "video_s": answer.video_s,
                # The records say `stop` or `length` alone; a server may have another word.
                "finish_reason_of_engine": answer.finish_reasons,
            }
            if answer.turns:
                line["turns"] = answer.turns
        yield line | dict(shared)


def records_of(line: Mapping[str, Any]) -> list[Record]:
    """The scored fields of a line, as records; none of a question without a score."""
    if line["error"] is not None:
        return []
    shared = {name: line[name] for name in ("id", "task", "category", "breakdowns", "doc_hash")}
    shared |= {"video": line["video_id"], "answer": line["target"]}
    # Lines of earlier releases lack some fields.
    fields = [name for name in PER_COMPLETION if name in line]
    records = [shared | {name: line[name][n] for name in fields} for n in range(len(line["correct"]))]
    # Rules were yes or no before they could score by degrees.
    for record in records:
        if record.get("correct_by_rule") is not None:
            record.setdefault(RULE, float(record["correct_by_rule"]))
    return records


def read_samples(folder: str | Path) -> dict[str, list[SampleLine]]:
    """The lines of each condition of an evaluation; none of a training run, whose samples have no condition."""
    conditions: dict[str, list[SampleLine]] = {}
    for line in read_jsonl(Path(folder) / SAMPLES_FILE):
        if "condition" in line:
            conditions.setdefault(line["condition"], []).append(line)
    return conditions
