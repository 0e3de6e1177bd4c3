"""A scoreboard: rows of evaluations beside published figures, and what each pair did not do alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from longrl.evaluation.published_figures import PublishedBenchmark, PublishedFigure, to_dict
from longrl.evaluation.scoreboard_rows import FIELDS, SCORE_WORDS, ScoreboardGroup, ScoreboardRow
from longrl.evaluation.scores import OVERALL, Score
from longrl.evaluation.setting_words import describe_differences, list_unrecorded, list_unsaid


@dataclass(frozen=True)
class AgainstPublished:
    """A row beside a published figure."""

    row: ScoreboardRow
    figure: PublishedFigure
    score: Score
    """Of the row, as near to the published scoring as it has one."""
    scored_by: str
    differences: Sequence[str]
    """What was not done alike, in words."""

    @property
    def gain(self) -> float:
        """The row's accuracy minus the published one; the interval is the row's, around it."""
        return self.score.accuracy - self.figure.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """Of the gain, the published figure taken as exact."""
        low, high = self.score.interval
        return low - self.figure.accuracy, high - self.figure.accuracy


@dataclass(frozen=True)
class Scoreboard:
    """All that a page shows."""

    groups: Sequence[ScoreboardGroup]
    published: Sequence[PublishedBenchmark]
    cost: str
    """The one that accuracies are drawn against."""

    def figures_of(self, group: ScoreboardGroup) -> list[PublishedFigure]:
        """The published figures about a group's benchmark."""
        return [figure for one in self.published if one.is_about(group.names) for figure in one.figures]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON."""
        return {"cost": self.cost, "groups": [self._group_dict(group) for group in self.groups]}

    def _group_dict(self, group: ScoreboardGroup) -> dict[str, Any]:
        first = group.rows[0]
        pairs = [against_published(row, figure) for figure in self.figures_of(group) for row in group.shown]
        return {
            "title": group.title,
            "majority_accuracy": group.majority,
            "rows": [
                row_dict(row) | {"differs_from_row": first.number, "differences": differences_between(row, first)}
                for row in group.rows
            ],
            "published": [to_dict(figure) for figure in self.figures_of(group)],
            "against_published": [
                {
                    "row": pair.row.number, "model": pair.figure.model, "source": pair.figure.source,
                    "difference": pair.gain, "low": pair.interval[0], "high": pair.interval[1],
                    "scored_by": pair.scored_by, "differences": list(pair.differences),
                    "not_said": list_unsaid(pair.figure.setting),
                    "not_recorded": list_unrecorded(pair.row.setting, pair.figure.setting),
                }
                for pair in pairs
            ],
        }  # fmt: skip


def row_dict(row: ScoreboardRow) -> dict[str, Any]:
    """A row as JSON."""
    setting = {name: value for name, value in asdict(row.setting).items() if value is not None}
    return {
        "number": row.number, "run": row.run, "condition": row.condition, "model": row.setting.model,
        "blind": row.blind, "score": row.score_name,
        "scores": {name: asdict(score) for name, score in row.scores.items()},
        "all_scores": {name: row.asked.get(field) or {} for name, field in FIELDS.items()},
        "groups": {
            name: {value: asdict(score) for value, score in by_value.items()} for name, by_value in row.groups.items()
        },
        "over_blind": row.asked.get("over_blind"),
        "majority_accuracy": row.majority,
        "costs": dict(row.costs),
        "protocol": row.results.get("protocol"),
        "setting": setting,
        "command": row.command,
    }  # fmt: skip


def against_published(row: ScoreboardRow, figure: PublishedFigure) -> AgainstPublished:
    """A row beside a published figure: by its protocol's own rule if it has one, else by the whole answer.

    Released evaluations look for the answer in all of the text; what stands in a tag alone would count less.
    """
    for field_name in ("protocol_scores", "lenient_scores"):
        score = row.score_of(field_name)
        if score is not None:
            break
    else:
        field_name, score = "scores", row.overall
    rule = (row.results.get("protocol") or {}).get("rule_name")
    words = {"protocol_scores": str(rule), "lenient_scores": SCORE_WORDS["robust"], "scores": SCORE_WORDS["strict"]}
    ours = replace(row.setting, scored_by=words[field_name])
    return AgainstPublished(row, figure, score, words[field_name], describe_differences(ours, figure.setting))


def nearest_rows(group: ScoreboardGroup, figure: PublishedFigure) -> list[ScoreboardRow]:
    """Of each run the row whose number of frames is nearest to the published one; the best where that is not said."""
    wanted = figure.setting.frames or figure.setting.frames_at_most
    rows: list[ScoreboardRow] = []
    for run in dict.fromkeys(row.run for row in group.shown):
        own = [row for row in group.shown if row.run == run]
        rows.append(min(own, key=lambda row: _distance(row.cost("frames"), wanted)))
    return rows


def _distance(frames: float | None, wanted: float | None) -> float:
    if wanted is None:
        return 0.0
    return math.inf if frames is None else abs(frames - wanted)


def differences_between(row: ScoreboardRow, other: ScoreboardRow) -> list[str]:
    """What a row did not do as another one of the same questions."""
    if row.number == other.number:
        return []
    return describe_differences(row.setting, other.setting, f"row {other.number}")


def category_score(figure: PublishedFigure, row: ScoreboardRow) -> Mapping[str, tuple[float, Score]]:
    """Categories and values that both have: published accuracy and ours."""
    ours = {name: score for name, score in row.scores.items() if name != OVERALL}
    for by_value in row.groups.values():
        ours |= by_value
    plain = {name.lower(): score for name, score in ours.items()}
    return {
        name: (accuracy, plain[name.lower()]) for name, accuracy in figure.categories.items() if name.lower() in plain
    }
