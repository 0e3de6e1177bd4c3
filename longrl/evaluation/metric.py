"""Accuracy with intervals as a torchmetrics metric: `validate`, `test` and `evaluate` all count with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from longrl.evaluation.scores import OVERALL, Summary, summarize
from longrl.strategies.axis import SINGLE_RANK, Axis

KEPT = (
    "id", "sample", "task", "category", "breakdowns", "video", "answer", "letter", "correct", "correct_lenient",
    "correct_by_rule", "accuracy_by_rule", "accuracy", "accuracy_lenient", "format", "finish_reason",
)  # fmt: skip
"""Fields of a record that scores are made from; texts stay where they are."""


class CategoryAccuracy(Metric):
    """Strict and robust accuracy of answered questions, overall, by category and by breakdown, over all ranks.

    The unit is the question, and questions about one video are dependent, so no running sum will do: the state is the
    scored fields themselves, one line of JSON per question. The lines are gathered from the ranks of `axis` and
    sorted, so that the result has the same bits whatever the number of ranks and the order of questions.

    Args:
        axis: the ranks that have other questions (`Parallel.dp`); ranks that share a sequence share its questions.

    Example:
        ```python
        metric = CategoryAccuracy()
        metric.update(group_records(row, group))   # all completions of one question
        metric.compute()["strict_accuracy"]
        ```
    """

    full_state_update = False
    lines: list[str]

    def __init__(self, axis: Axis = SINGLE_RANK) -> None:
        # torchmetrics gathers tensors, and waits for ever for a rank without any; the axis gathers lines.
        super().__init__(sync_on_compute=False)
        self.axis = axis
        self.add_state("lines", [], dist_reduce_fx=None)

    def update(self, question: Sequence[Mapping[str, Any]]) -> None:
        """Adds the records (`longrl.evaluation.records`) of all completions of a question."""
        kept = [{name: record[name] for name in KEPT if name in record} for record in question]
        self.lines.append(json.dumps(kept, sort_keys=True))

    def compute(self) -> dict[str, Tensor]:
        """Its main numbers by the names of a log: `strict_accuracy`, `strict_accuracy/temporal`, `format_rate`, ..."""
        summary = self.summary()
        if summary is None:
            return {}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in logged_values(summary).items()}

    def summary(self) -> Summary | None:
        """Summary of all ranks' questions, the same on all of them; None without any. Every rank must call it."""
        lines = sorted(line for of_rank in self.axis.gather(self.lines) for line in of_rank)
        records = [record for line in lines for record in json.loads(line)]
        return summarize(records) if records else None


def logged_values(summary: Summary) -> dict[str, float]:
    """A summary's main numbers by the names of a log."""
    main = {
        "strict_accuracy": summary.scores[OVERALL].accuracy,
        "robust_accuracy": summary.lenient_scores[OVERALL].accuracy,
        "format_rate": summary.format_rate,
        "truncation_rate": summary.truncation_rate,
    }
    by_category = {name: score.accuracy for name, score in summary.scores.items() if name != OVERALL}
    graded = {
        f"{task}/{name}": scores[OVERALL].accuracy
        for task, measures in summary.graded.items()
        for name, scores in measures.items()
    }
    return main | graded | {f"strict_accuracy/{name}": value for name, value in by_category.items()}
