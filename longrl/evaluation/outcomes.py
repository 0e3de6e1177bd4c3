"""What the answers under one condition come to: records, scores, and what became of the questions without an answer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrl.evaluation.metric import CategoryAccuracy
from longrl.evaluation.records import answer_record
from longrl.evaluation.scores import Difference, Score, Summary, paired_difference
from longrl.types import Completion, Group, Prompt, Row, UnusableSample

if TYPE_CHECKING:
    from longrl.evaluation.answering import Answer
    from longrl.rewards import RewardSum

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One condition: the same questions are asked under several, such as numbers of frames, or without video."""

    name: str
    records: Mapping[int, Sequence[Record]]
    """Number of the row -> the records of its completions."""
    failures: Mapping[int, str]
    """Number of the row -> why there is no answer: `decode`, `not usable`, `no reply`, `not judged`."""
    summary: Summary | None
    """Of the answered questions: the others are left out. None without any."""
    as_wrong: Mapping[str, Score]
    """Strict scores by category with the others counted as wrong."""
    num_frames: int | None = None
    """Asked for of every video; None where the data's own rule decides, or nothing is shown."""
    blind: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "num_frames": self.num_frames,
            "blind": self.blind,
            "num_questions": len(self.records) + len(self.failures),
            "failures": dict(sorted(Counter(self.failures.values()).items())),
            "scores_with_failures_as_wrong": {name: dataclasses.asdict(score) for name, score in self.as_wrong.items()},
            **(self.summary.to_dict() if self.summary else {"scores": {}}),
        }


def outcome(
    name: str,
    rows: Sequence[Row],
    answers: Mapping[int, Answer],
    skipped: Mapping[int, UnusableSample],
    *,
    breakdowns: Sequence[str] = (),
    reward: RewardSum | None = None,
    num_frames: int | None = None,
    blind: bool = False,
) -> Outcome:
    """Judges the answers to `rows` and counts them, with the metric that `validate` and `test` count with.

    Args:
        name: of the condition.
        rows: all questions.
        answers: by the number of their row.
        skipped: why others have none.
        breakdowns: fields of the rows' metadata to score by.
        reward: judges tasks without a judge of their own.
        num_frames: see `Outcome`.
        blind: see `Outcome`.
    """
    judged = _records(rows, answers, breakdowns, reward)
    unjudged = {index for index, records in judged.items() if any(record["correct"] is None for record in records)}
    failures = {index: failure_kind(item) for index, item in skipped.items()} | dict.fromkeys(unjudged, "not judged")
    found = {index: records for index, records in judged.items() if index not in unjudged}
    answered, everything = CategoryAccuracy(), CategoryAccuracy()
    for records in found.values():
        answered.update(records)
        everything.update(records)
    for index in failures:
        everything.update([{**_record(rows[index], Completion(*_NO_TOKENS, "", "stop"), 0, breakdowns), **_WRONG}])
    total = everything.summary()
    return Outcome(
        name, found, failures, answered.summary(), total.scores if total else {}, num_frames=num_frames, blind=blind
    )


def gain_over(before: Outcome, after: Outcome) -> Difference | None:
    """What `after` gains over `before` on the questions that both answered; None if there are none."""
    common = [index for index in before.records if index in after.records]
    if not common:
        return None
    first, second = (
        [{**record, "id": index} for index in common for record in side.records[index]] for side in (before, after)
    )
    return paired_difference(first, second)


def failure_kind(item: UnusableSample) -> str:
    """What a question without an answer is counted under."""
    if item.path is not None:
        return "decode"
    return "no reply" if item.reason.startswith("no reply") else "not usable"


def video_name(row: Row) -> str:
    """What a row's video is called: `video_id` of the metadata, else the file's name; "" without a video."""
    known = row.metadata.get("video_id")
    if known is not None:
        return str(known)
    return Path(row.videos[0]).name if row.videos else ""


_WRONG = {"correct": False, "correct_lenient": False, "accuracy": 0.0}
_NO_TOKENS = torch.empty(0, dtype=torch.int64), torch.empty(0)


def _records(
    rows: Sequence[Row], answers: Mapping[int, Answer], breakdowns: Sequence[str], reward: RewardSum | None
) -> dict[int, list[Record]]:
    if reward is None:
        return {
            index: [_record(rows[index], said, n, breakdowns) for n, said in enumerate(completions(answer))]
            for index, answer in answers.items()
        }
    groups = {index: Group(_prompt(rows[index]), completions(answer)) for index, answer in answers.items()}
    reward.score(list(groups.values()))
    return {
        index: [_scored(group, n, breakdowns) for n in range(len(group.completions))] for index, group in groups.items()
    }


def _scored(group: Group, n: int, breakdowns: Sequence[str]) -> Record:
    assert group.rewards is not None
    assert group.valid is not None
    return _record(
        group.prompt.row,
        group.completions[n],
        n,
        breakdowns,
        rewards={name: float(part[n]) for name, part in group.reward_parts.items()},
        reward=float(group.rewards[n]),
        scored=bool(group.valid[n]),
    )


def _record(row: Row, completion: Completion, n: int, breakdowns: Sequence[str], **scored: Any) -> Record:
    """Videos go by their names: a record is the same on every machine."""
    return {**answer_record(row, completion, index=n, breakdowns=breakdowns, **scored), "video": video_name(row)}


def completions(answer: Answer) -> list[Completion]:
    """An answer's texts as completions; of their tokens the number alone is known."""
    return [
        Completion(torch.zeros(count, dtype=torch.int64), torch.zeros(count), text, "length" if cut else "stop")
        for text, count, cut in zip(
            answer.texts,
            answer.num_completion_tokens,
            (reason == "length" for reason in answer.finish_reasons),
            strict=True,
        )
    ]


def _prompt(row: Row) -> Prompt:
    return Prompt(row.id, _NO_TOKENS[0], _NO_TOKENS[0][None], (), row)
