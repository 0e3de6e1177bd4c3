"""What a benchmark reports beside the mean over its questions: a mean over tasks, and scores of groups of questions.

`protocol.mean_over` and `protocol.groups` say which. Both are made from the records that every other score is made of,
and have intervals that take questions on one video as one cluster.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field as dataclass_field

from longrl.evaluation.records import field_value
from longrl.evaluation.scores import RULE, Responses, Score, cluster_of, macro_score, mean_of, score
from longrl.io.functions import import_function
from longrl.types import Row

logger = logging.getLogger(__name__)

GroupScore = Callable[[Sequence[Row], Sequence[float]], float]
"""(rows of a group, how right the answer to each is) -> its score in [0, 1]; a ValueError for a group that it cannot
score, such as one that lacks a question."""
Averages = dict[str, dict[str, Score]]
""""mean over task_type", "groups" or "groups, level 2" -> reading -> score."""
READINGS = {"strict": "accuracy", "robust": "accuracy_lenient", "rule": RULE}
"""How answers are read, as everywhere, -> the field of a record that has it, a share of what is right."""


@dataclass(frozen=True)
class QuestionGroups:
    """Questions that count together, as the four on a video of Video-MME-v2 (arXiv:2604.05015).

    Example:
        `QuestionGroups("group", "longrl.evaluation.group_scores.video_mme_v2", by=["level"])`
    """

    field: str
    """Field of the rows' metadata that names the group of a question."""
    score: str
    """Import path (or `file.py:function`) of a `GroupScore`; `longrl/evaluation/group_scores.py` has published ones."""
    by: list[str] = dataclass_field(default_factory=list)
    """Fields of the metadata by which groups are scored, too: what the last question of a group says counts."""

    def scorer(self) -> GroupScore:
        """The function that `score` names.

        Raises:
            ValueError: there is none.
        """
        return import_function(self.score, "protocol.groups.score")

    def of(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Name of each group -> the indices of its rows, in their order."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if self.field in row.metadata:
                groups[str(row.metadata[self.field])].append(index)
        return dict(groups)


def check_averages(rows: Sequence[Row], mean_over: str | None, groups: QuestionGroups | None) -> None:
    """Finds out before a question is asked whether averages can be made of the rows.

    Raises:
        ValueError: no row has the field, or no group can be scored; that some cannot is a warning.
    """
    named = {"protocol.mean_over": mean_over, "protocol.groups.field": groups.field if groups else None}
    for option, name in named.items():
        if name not in (None, "category") and not any(name in row.metadata for row in rows):
            known = ", ".join(sorted({key for row in rows for key in row.metadata})) or "none"
            raise ValueError(
                f"{option}={name} is a field that no row has in its metadata; name some of what is there: {known}"
            )
    if mean_over is not None and any(isinstance(row.metadata.get(mean_over), list | tuple) for row in rows):
        raise ValueError(
            f"protocol.mean_over={mean_over} is a field that says several things of some questions, which are of one "
            "task each; list it under breakdowns, and set protocol.mean_over to another field or to null"
        )
    if groups is None:
        return
    scorer, by_name = groups.scorer(), groups.of(rows)
    errors = {}
    for name, indices in by_name.items():
        try:
            scorer([rows[index] for index in indices], [0.0] * len(indices))
        except ValueError as error:
            errors[name] = error
    if errors:
        first, why = next(iter(errors.items()))
        problem = f"{len(errors)} of {len(by_name)} groups of questions cannot be scored; the first, {first!r}: {why}"
        if len(errors) == len(by_name):
            raise ValueError(f"{problem}. Correct data.test, or set protocol.groups to null")
        logger.warning("%s. They are left out of the scores of groups", problem)


def average_scores(
    rows: Sequence[Row], judged: Mapping[int, Responses], mean_over: str | None, groups: QuestionGroups | None
) -> Averages:
    """The averages of one condition.

    Args:
        rows: all questions.
        judged: index of the row -> the records of its completions, of questions that have a score.
        mean_over: `category`, or a field of the metadata; None for no mean over tasks.
        groups: None for none. A group is left out where one of its questions has no score.
    """
    averages: Averages = {}
    questions = list(judged.values())
    if mean_over is not None and questions:
        strata = [
            question[0]["category"] if mean_over == "category" else str(field_value(rows[index], mean_over))
            for index, question in judged.items()
        ]
        clusters = [cluster_of(question) for question in questions]
        averages[f"mean over {mean_over}"] = {
            reading: macro_score([mean_of(question, name) for question in questions], strata, clusters)
            for reading, name in _readings(questions).items()
        }
    if groups is not None:
        averages |= _group_averages(rows, judged, groups)
    return averages


def _readings(questions: Sequence[Responses]) -> dict[str, str]:
    """Those that every record has."""
    records = [record for question in questions for record in question]
    return {
        reading: name for reading, name in READINGS.items() if all(record.get(name) is not None for record in records)
    }


def _group_averages(rows: Sequence[Row], judged: Mapping[int, Responses], groups: QuestionGroups) -> Averages:
    scorer = groups.scorer()
    complete = [indices for indices in groups.of(rows).values() if all(index in judged for index in indices)]
    names = _readings([judged[index] for indices in complete for index in indices])
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # label -> reading -> scores
    clusters: dict[str, list[str]] = defaultdict(list)
    for indices in complete:
        asked, last = [rows[index] for index in indices], rows[indices[-1]]
        labels = ["groups", *(f"groups, {name} {last.metadata[name]}" for name in groups.by if name in last.metadata)]
        try:
            scored = {reading: _group_score(scorer, asked, indices, judged, name) for reading, name in names.items()}
        except ValueError:  # told before the first question was asked
            continue
        for label in labels:
            clusters[label].append(cluster_of(judged[indices[0]]))
            for reading, value in scored.items():
                values[label][reading].append(value)
    return {
        label: {reading: score(of, clusters[label]) for reading, of in values[label].items()}
        for label in sorted(values)  # "groups" comes first
    }


def _group_score(
    scorer: GroupScore, asked: Sequence[Row], indices: Sequence[int], judged: Mapping[int, Responses], name: str
) -> float:
    """Score of a group, the mean over the samples of its questions: the first answers to all, the second ones, .."""
    samples = zip(*(judged[index] for index in indices), strict=False)
    of_samples = [scorer(asked, [float(record[name]) for record in records]) for records in samples]
    return sum(of_samples) / len(of_samples)
