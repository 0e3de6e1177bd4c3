"""The report of an evaluation: what report.html holds beside scores, and the tables that commands print."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longrl.datamodules.media.sampling import VideoSampling, read_span
from longrl.datamodules.media.sources import read_video
from longrl.evaluation.charts import plot_frame_sweep
from longrl.evaluation.comparison import Comparison, format_points
from longrl.evaluation.outcomes import Outcome
from longrl.evaluation.protocol import list_protocol_facts
from longrl.evaluation.report_page import PageTable, Report, SampleCard, SectionPart, score_table, write_report
from longrl.evaluation.samples import SampleLine
from longrl.evaluation.scores import OVERALL, Difference, Score, percent
from longrl.evaluation.turn_cards import turn_cards
from longrl.types import Row

NOTE = (
    "Strict accuracy (only what stands in <answer>) in percent with its 95% interval: Wilson's, with questions about "
    "one video taken as one cluster."
)
NUM_CARD_FRAMES = 10
MAX_TRUNCATED = 0.02
"""Share of answers that may be cut off before the report warns."""


def write_benchmark_report(
    folder: Path,
    results: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    lines: Sequence[SampleLine],
    comparisons: Mapping[str, Comparison],
    num_cards: int,
) -> Path:
    """Writes report.html and its charts.

    Args:
        folder: of the evaluation.
        results: what is in results.json.
        outcomes: all conditions.
        rows: all questions.
        lines: what is in samples.jsonl.
        comparisons: condition -> comparison with another run.
        num_cards: questions that are shown with what was answered.

    Returns:
        Path of report.html.
    """
    summaries = {outcome.name: outcome.summary for outcome in outcomes if outcome.summary is not None}
    scores = {name: _page_scores(summary.scores) for name, summary in summaries.items()}
    majority = next((summary.majority_accuracy for summary in summaries.values()), None)
    sections: dict[str, list[SectionPart | Figure]] = {}

    by_num_frames = {
        outcome.num_frames: scores[outcome.name][OVERALL]
        for outcome in outcomes
        if outcome.num_frames is not None and outcome.name in scores
    }
    if len(by_num_frames) > 1:
        blind = next((scores[outcome.name][OVERALL] for outcome in outcomes if outcome.blind and outcome.summary), None)
        sections["Frames"] = [plot_frame_sweep(by_num_frames, majority, blind)]

    sections["Rates and baselines"] = [rates_table(outcomes, results), *list_remarks(outcomes)]
    if any(summary.protocol_scores for summary in summaries.values()):
        by_rule = {name: _page_scores(summary.protocol_scores) for name, summary in summaries.items()}
        categories = list(next(scores for scores in by_rule.values() if scores))
        sections[f"By the protocol's own rule: {results['protocol']['rule_name']}"] = [score_table(by_rule, categories)]
    if any(outcome.figures for outcome in outcomes):
        sections[f"As {results['protocol']['name']} reports it"] = [figures_table(outcomes)]
    averages = average_tables(outcomes)
    if averages:
        sections["Averages of the protocol"] = list(averages)
    for field in dict.fromkeys(field for summary in summaries.values() for field in summary.breakdowns):
        by_run = {run: _page_scores(summary.breakdowns[field]) for run, summary in summaries.items()}
        values = list(dict.fromkeys(value for by_value in by_run.values() for value in by_value))
        sections[f"By {field.replace('_', ' ')}"] = [score_table(by_run, values)]
    for run, summary in summaries.items():
        for task, measures in summary.graded.items():
            by_measure = {name: _page_scores(by_category) for name, by_category in measures.items()}
            categories = list(next(iter(measures.values())))
            sections[f"{run}: {task}"] = [score_table(by_measure, categories)]
    for comparison in comparisons.values():
        parts = sections.setdefault("Against another run", [])
        parts.append(PageTable(["", "strict", "robust", "questions", "won", "lost"], comparison.table_rows()))
        parts.append(
            f"{comparison.second} minus {comparison.first}, in percentage points on the questions that both answered."
        )
        parts += [f"Won: {', '.join(comparison.won)}"] if comparison.won else []
        parts += [f"Lost: {', '.join(comparison.lost)}"] if comparison.lost else []
        if comparison.differences:
            parts.append(PageTable(["not asked alike"], [[text] for text in comparison.differences]))

    report = Report(
        title=results["benchmark"],
        subtitle=f"{results['policy']['model']}: {len(rows)} questions, protocol of {results['protocol']['name']}",
        results=scores,
        samples=cards(rows, lines, num_cards),
        chance=majority,
        facts=_facts(results),
        note=NOTE,
        sections=sections,
    )
    return write_report(folder, report)


def average_tables(outcomes: Sequence[Outcome]) -> list[PageTable]:
    """A table of each condition's means over tasks and scores of groups, a column for each reading of the answers."""
    tables = []
    for outcome in outcomes:
        by_reading: dict[str, dict[str, Any]] = {}
        for label, of in outcome.averages.items():
            for reading, score in _page_scores(of).items():
                by_reading.setdefault(f"{outcome.name}: {reading}", {})[label] = score
        if by_reading:
            tables.append(score_table(by_reading, list(outcome.averages)))
    return tables


def list_remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """Sentences that a reader should know before believing a number."""
    texts = []
    for outcome in outcomes:
        summary = outcome.summary
        if summary is None:
            why = "answers are not released" if "hidden" in outcome.failures.values() else "no question was answered"
            texts.append(f"{outcome.name}: {why}.")
            continue
        if outcome.num_torn:
            texts.append(f"{outcome.name}: of {outcome.num_torn} torn videos only what is there was shown.")
        predictions = summary.letters.get("predictions", {})
        letters = [letter for letter in predictions if letter != "none"]
        if len(letters) == 1 and sum(predictions.values()) > 1:
            texts.append(f"{outcome.name}: every answer that names an option says {letters[0]}.")
        gain = summary.over_majority
        if gain is not None and gain.low <= 0:
            how = "worse than" if gain.high < 0 else "not shown to be better than"
            texts.append(
                f"{outcome.name}: {how} always saying {summary.majority_letter}, which scores "
                f"{100 * (summary.majority_accuracy or 0):.1f}% (difference in points {format_points(gain)})."
            )
        if summary.truncation_rate > MAX_TRUNCATED:
            texts.append(
                f"{outcome.name}: {100 * summary.truncation_rate:.1f}% of the answers were cut off; raise "
                "sampling.max_completion_tokens."
            )
    return texts


def _page_scores(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Scores as page and charts read them, with the clustered interval."""
    shown = {}
    for name, score in scores.items():
        low, high = score.interval
        shown[name] = {**asdict(score), "low": low, "high": high}
    return shown


def figures_table(outcomes: Sequence[Outcome]) -> PageTable:
    """What the protocol's benchmark reports, a column for each condition: in percent where no unit is named."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.figures)
    shown = [{name: f"{value:.1f}" for name, value in outcome.figures.items()} for outcome in outcomes]
    rows = [[name, *(column.get(name, "-") for column in shown)] for name in names]
    return PageTable(["", *(outcome.name for outcome in outcomes)], rows)


def rates_table(outcomes: Sequence[Outcome], results: Mapping[str, Any]) -> PageTable:
    """A table with a column for each condition, in percent."""
    rule_name = results["protocol"]["rule_name"]
    columns = [_rates(outcome, results["conditions"][outcome.name], rule_name) for outcome in outcomes]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return PageTable(["", *(outcome.name for outcome in outcomes)], rows)


def _rates(outcome: Outcome, result: Mapping[str, Any], rule_name: str | None) -> dict[str, str]:
    """Names and values that are shown of one condition beside its categories."""
    failures = ", ".join(f"{count} {kind}" for kind, count in result["failures"].items()) or "none"
    unanswered = {"questions without answer": failures}
    if outcome.as_wrong and outcome.failures:
        unanswered["strict, those counted as wrong"] = percent(outcome.as_wrong[OVERALL])
    summary = outcome.summary
    if summary is None:
        return unanswered
    column = {
        "strict: what stands in <answer>": percent(summary.scores[OVERALL]),
        "robust: the whole answer": percent(summary.lenient_scores[OVERALL]),
        **({f"protocol: {rule_name}": percent(summary.protocol_scores[OVERALL])} if summary.protocol_scores else {}),
        **{label: percent(of.get("rule") or of["strict"]) for label, of in outcome.averages.items()},
        "questions": str(summary.scores[OVERALL].n),
        "with the think-answer form": f"{100 * summary.format_rate:.1f}",
        "cut off": f"{100 * summary.truncation_rate:.1f}",
        **unanswered,
    }
    if summary.over_majority is not None and summary.majority_accuracy is not None:
        column[f"always {summary.majority_letter}"] = f"{100 * summary.majority_accuracy:.1f}"
        column["strict minus that, in points"] = format_points(summary.over_majority)
    if result["over_blind"]:
        column["strict minus no video, in points"] = format_points(Difference(**result["over_blind"]))
    for category, gain in result.get("over_shuffled", {}).items():
        of_category = "" if category == OVERALL else f", {category}"
        column[f"strict minus shuffled frames, in points{of_category}"] = format_points(Difference(**gain))
    return column


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    policy, questions = results["policy"], results["questions"]
    first = next(condition["reading"] for condition in results["conditions"].values())
    facts = {
        "model": policy["model"],
        "revision": policy["revision"],
        "weights": policy.get("weights"),
        "engine": policy["engine"],
        **list_protocol_facts(results),
        "question": first["question_template"],
        "questions": f"{questions['asked']} of {questions['records']} records; {questions['malformed']} malformed",
        "data": questions["fingerprint"],
        "decoder": first["decoder"],
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


# ---- cards ----


def cards(rows: Sequence[Row], lines: Sequence[SampleLine], count: int) -> list[SampleCard]:
    """Some questions that all conditions answered, always the same ones: every category in turn, wrong answers too."""
    by_condition: dict[str, dict[int, SampleLine]] = {}
    for line in lines:
        by_condition.setdefault(line["condition"], {})[line["doc_id"]] = line
    counts = Counter(line["doc_id"] for line in lines if line["error"] is None)
    common = sorted(index for index, count in counts.items() if count == len(by_condition))
    random.Random(0).shuffle(common)
    by_category: dict[str, list[int]] = {}
    for index in common:
        by_category.setdefault(rows[index].category, []).append(index)
    rounds = itertools.zip_longest(*map(reversed, by_category.values()))
    chosen = [index for one_of_each in rounds for index in one_of_each if index is not None][:count]
    return [sample_card(rows[index], {name: each[index] for name, each in by_condition.items()}) for index in chosen]


def sample_card(row: Row, lines: Mapping[str, SampleLine]) -> SampleCard:
    """A card of a question with frames of its video and the first completion of several runs.

    Args:
        row: the question.
        lines: run -> its line of samples.jsonl, in the order of their columns.

    Raises:
        ValueError: a line is of another question.
    """
    ids = {run: line["id"] for run, line in lines.items()}
    if set(ids.values()) != {row.id}:
        raise ValueError(f"a sample card shows one question, {row.id!r}, got {ids}; pass each run's line of that id")
    frames = None
    timestamps: Sequence[float] = ()
    if row.videos:
        span = row.metadata.get("span_s")
        try:
            part = read_span(span) if span else None
            sampling = VideoSampling(fps=None, num_frames=NUM_CARD_FRAMES, span_s=part, torn="keep")
            video = read_video(row.videos[0], sampling)
            frames = np.ascontiguousarray(video.pixels.permute(0, 2, 3, 1))  # [F, H, W, 3], as pictures are saved
            timestamps = video.timestamps
        except ValueError:  # also `UnusableSample`: of an evaluation without video, or one that has ended long ago
            frames = None
    turns = {run: turn_cards(line["turns"][0], row.videos) for run, line in lines.items() if line.get("turns")}
    return SampleCard(row, lines, frames, timestamps, turns)
