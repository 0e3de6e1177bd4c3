"""Outcomes of a condition: records, scores, and why questions have no answer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longrl.evaluation.answering import Answer
from longrl.evaluation.averages import QuestionGroups, average_scores
from longrl.evaluation.metric import CategoryAccuracy
from longrl.evaluation.records import Record, group_records, video_name
from longrl.evaluation.scores import OVERALL, Difference, Score, Summary, paired_difference
from longrl.rewards import RewardSum
from longrl.rewards.reward_sum import RewardFn
from longrl.turns import restored_turn
from longrl.types import Completion, Group, Prompt, Row, UnusableSample

FiguresFunction = Callable[[Sequence[Record]], Mapping[str, float]]
"""What a benchmark reports of the records of all judged answers: name -> value, in percent where no unit is named."""
HIDDEN = "hidden_answer"
"""Field of the metadata of a question whose right answer only a server knows; nothing here is scored by it."""
SHUFFLED = ", shuffled"
"""Behind the name of a condition whose frames are shown in another order."""


@dataclass(frozen=True)
class Outcome:
    """One condition: the same questions are asked under several, such as numbers of frames, or without video."""

    name: str
    answers: Mapping[int, Answer]
    """Index of the row -> what was answered."""
    records: Mapping[int, Sequence[Record]]
    """Index of the row -> the records of its completions, judged or not."""
    failures: Mapping[int, str]
    """Index of the row -> why it has no score: `decode`, `not usable`, `no reply`, `not judged`, `hidden`, whose right
    answer is not released."""
    summary: Summary | None
    """Scores of the other questions. None without any."""
    as_wrong: Mapping[str, Score]
    """Strict scores by category with failures counted as wrong."""
    num_frames: int | None = None
    """Asked for of every video; None where the data's own rule decides, or nothing is shown."""
    blind: bool = False
    num_torn: int = 0
    """Different videos of which only a part was shown, for their files were cut off."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the protocol's benchmark reports besides, by its name."""
    averages: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """Means over tasks and scores of groups that the protocol has; see `averages.py`."""

    @property
    def judged(self) -> dict[int, Sequence[Record]]:
        """Records of the questions that have a score."""
        return {index: records for index, records in self.records.items() if index not in self.failures}

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON."""
        averages = {
            label: {reading: dataclasses.asdict(score) for reading, score in of.items()}
            for label, of in self.averages.items()
        }
        return {
            "num_frames": self.num_frames,
            "blind": self.blind,
            "num_questions": len(self.records.keys() | self.failures.keys()),
            "failures": dict(sorted(Counter(self.failures.values()).items())),
            "videos_used_in_part": self.num_torn,
            "scores_with_failures_as_wrong": {name: dataclasses.asdict(score) for name, score in self.as_wrong.items()},
            **(self.summary.to_dict() if self.summary else {"scores": {}}),
            **({"protocol_figures": dict(self.figures)} if self.figures else {}),
            **({"averages": averages} if averages else {}),
        }


def judge_answers(
    rows: Sequence[Row],
    answers: Mapping[int, Answer],
    breakdowns: Sequence[str] = (),
    reward: RewardSum | None = None,
    rule: RewardFn | None = None,
) -> dict[int, list[Record]]:
    """The records of stored answers, by the index of their row.

    Args:
        rows: all questions.
        answers: by the index of their row.
        breakdowns: fields of the rows' metadata to score by.
        reward: judges tasks without a judge of their own.
        rule: a published protocol's own scoring.
    """
    groups = {}
    for index, answer in answers.items():
        completions = []
        said = zip(answer.texts, answer.num_completion_tokens, answer.finish_reasons, strict=True)
        for number, (text, count, reason) in enumerate(said):
            # Of an answer's tokens the number alone is stored; servers have more words for an answer that is complete.
            tokens = torch.zeros(count, dtype=torch.int64)
            completion = Completion(tokens, torch.zeros(count), text, "length" if reason == "length" else "stop")
            if answer.turns:
                completion = replace(completion, turns=tuple(map(restored_turn, answer.turns[number])))
            completions.append(completion)
        groups[index] = _group_of(rows[index], completions)
    if reward is not None:
        reward.score(list(groups.values()))
    return {index: group_records(rows[index], group, breakdowns, rule) for index, group in groups.items()}


def _group_of(row: Row, completions: list[Completion]) -> Group:
    no_tokens = torch.empty(0, dtype=torch.int64)
    return Group(Prompt(row.id, no_tokens, no_tokens[None], (), row), completions)


def make_outcome(
    name: str,
    rows: Sequence[Row],
    answers: Mapping[int, Answer],
    records: Mapping[int, Sequence[Record]],
    skipped: Mapping[int, UnusableSample],
    *,
    breakdowns: Sequence[str] = (),
    num_frames: int | None = None,
    blind: bool = False,
    figures: FiguresFunction | None = None,
    mean_over: str | None = None,
    groups: QuestionGroups | None = None,
) -> Outcome:
    """Counts records with the metric that `validate` counts with.

    Args:
        name: of the condition.
        rows: all questions.
        answers: by the index of their row.
        records: the same answers judged.
        skipped: why other rows have none.
        breakdowns: fields of the rows' metadata to score by.
        num_frames: see `Outcome`.
        blind: see `Outcome`.
        figures: of a published protocol.
        mean_over: see `PublishedProtocol`.
        groups: see `PublishedProtocol`.
    """
    failures = {}
    for index, item in skipped.items():
        kind = "no reply" if item.reason.startswith("no reply") else "not usable"
        # Only a sample of which a file could not be read names one.
        failures[index] = kind if item.path is None else "decode"
    answered, everything = CategoryAccuracy(), CategoryAccuracy()
    for index, judged in records.items():
        if any(record["correct"] is None for record in judged):
            failures[index] = "hidden" if rows[index].metadata.get(HIDDEN) else "not judged"
        else:
            answered.update(judged)
            everything.update(judged)
    for index in (index for index, kind in failures.items() if kind != "hidden"):
        # An empty answer has the question's category, breakdowns and video, and is wrong by any judge.
        empty = Completion(torch.empty(0, dtype=torch.int64), torch.empty(0), "", "stop")
        (record,) = group_records(rows[index], _group_of(rows[index], [empty]), breakdowns)
        everything.update([{**record, "correct": False, "correct_lenient": False}])
    total = everything.summary()
    as_wrong = total.scores if total else {}
    torn = {video_name(rows[index]) for index, answer in answers.items() if answer.num_torn}
    scored = {index: judged for index, judged in records.items() if index not in failures}
    named = figures([record for judged in scored.values() for record in judged]) if figures and scored else {}
    averages = average_scores(rows, scored, mean_over, groups)
    summary = answered.summary()
    return Outcome(
        name, answers, records, failures, summary, as_wrong, num_frames, blind, len(torn), named, averages
    )  # fmt: skip


def gains_by_category(before: Outcome, after: Outcome) -> dict[str, Difference]:
    """`gain_over` of all questions and of each category; of a category that neither answered nothing."""
    common = before.judged.keys() & after.judged.keys()
    categories = sorted({after.judged[index][0]["category"] for index in common} - {OVERALL})
    gains = {}
    for category in (OVERALL, *categories):
        sides = []
        for side in (before, after):
            records = {
                index: records
                for index, records in side.records.items()
                if category in (OVERALL, records[0]["category"])
            }
            sides.append(replace(side, records=records))
        gain = gain_over(*sides)
        if gain is not None:
            gains[category] = gain
    return gains


def gain_over(before: Outcome, after: Outcome) -> Difference | None:
    """Gain of `after` over `before` on the questions that both answered; None if there are none."""
    judged = before.judged, after.judged
    common = [index for index in judged[0] if index in judged[1]]
    if not common:
        return None
    # Questions of joined sources may have one id; their rows' indices keep them apart.
    first, second = ([[{**record, "id": index} for record in side[index]] for index in common] for side in judged)
    return paired_difference(first, second)
