"""The report of an evaluation: report.html, its charts, and the table on the console."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.evaluation.charts import plot_frame_sweep
from longrl.evaluation.comparison import Comparison, Comparisons, points
from longrl.evaluation.outcomes import Outcome
from longrl.evaluation.report_page import (
    PageTable,
    Report,
    SampleCard,
    SectionPart,
    sample_card,
    score_table,
    write_report,
)
from longrl.evaluation.scores import OVERALL, Difference, Score
from longrl.types import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longrl.commands.evaluate import EvaluationConfig

NOTE = (
    "Strict accuracy (only what stands in <answer>) in percent with its 95% interval: Wilson's, with questions about "
    "one video taken as one cluster."
)
NUM_CARD_FRAMES = 10


def write_benchmark_report(
    folder: Path,
    config: EvaluationConfig,
    results: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    compared: Comparisons | None,
) -> Path:
    """Writes report.html and its charts.

    Args:
        folder: of the evaluation.
        config: says what was asked, and how many cards are shown.
        results: what is in results.json.
        outcomes: all conditions.
        rows: all questions.
        compared: with another run, if it was.

    Returns:
        Path of report.html.
    """
    scored = {found.name: found.summary for found in outcomes if found.summary is not None}
    sections: dict[str, list[SectionPart | Figure]] = {}
    swept = {found.num_frames: found for found in outcomes if found.num_frames is not None and found.summary}
    if len(swept) > 1:
        blind = next((_clustered(found) for found in outcomes if found.blind and found.summary), None)
        drawn = {count: _clustered(found) for count, found in swept.items()}
        sections["Frames"] = [plot_frame_sweep(drawn, _majority(outcomes), blind)]
    sections["Rates and baselines"] = [PageTable(*_rates(outcomes, results)), *remarks(outcomes)]
    for name in config.breakdowns:
        of_run = {run: _scores(summary.breakdowns[name]) for run, summary in scored.items()}
        values = list(dict.fromkeys(value for of_value in of_run.values() for value in of_value))
        sections[f"By {name.replace('_', ' ')}"] = [score_table(of_run, values)]
    if compared is not None:
        sections["Against another run"] = [
            part for found in compared.by_condition.values() for part in _comparison(found)
        ]
    report = Report(
        title=config.name,
        subtitle=f"{results['policy']['model']}: {len(rows)} questions",
        results={run: _scores(summary.scores) for run, summary in scored.items()},
        samples=cards(outcomes, rows, config.num_cards),
        chance=_majority(outcomes),
        facts=_facts(results),
        note=NOTE,
        sections=sections,
    )
    return write_report(folder, report)


def remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader should know before believing a number."""
    found = []
    for outcome in outcomes:
        summary = outcome.summary
        if summary is None:
            found.append(f"{outcome.name}: no question was answered.")
            continue
        said = {letter: n for letter, n in summary.letters.get("predictions", {}).items() if letter != "none"}
        if len(said) == 1 and sum(summary.letters["predictions"].values()) > 1:
            found.append(f"{outcome.name}: every answer that names an option says {next(iter(said))}.")
        gain = summary.over_majority
        if gain is not None and gain.low <= 0:
            how = "worse than" if gain.high < 0 else "not shown to be better than"
            found.append(
                f"{outcome.name}: {how} always saying {summary.majority_letter}, which scores "
                f"{100 * (summary.majority_accuracy or 0):.1f}% (difference in points {points(gain)})."
            )
        if summary.truncation_rate > 0.02:
            found.append(
                f"{outcome.name}: {100 * summary.truncation_rate:.1f}% of the answers were cut off; raise "
                "sampling.max_completion_tokens."
            )
    return found


def show(
    name: str,
    outcomes: Sequence[Outcome],
    results: Mapping[str, Any],
    compared: Comparisons | None,
    report: Path,
) -> None:
    """The table of an evaluation on the console."""
    from rich.console import Console
    from rich.table import Table

    from longrl.evaluation.comparison import show as show_comparison

    console = Console(width=max(80, 36 + 22 * len(outcomes)))
    head, rows = _rates(outcomes, results)
    table = Table(*head, title=f"{name}, in percent")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for found in outcomes:
        if found.summary is not None:
            console.print(_category_table(found))
    for text in remarks(outcomes):
        console.print(text, highlight=False, soft_wrap=True)
    if compared is not None:
        show_comparison(compared)
    console.print(f"report: {report}\nresults: {report.with_name('results.json')}", highlight=False, soft_wrap=True)


def _category_table(found: Outcome) -> Any:
    from rich.table import Table

    assert found.summary is not None
    table = Table(found.name, "strict", "robust", "n")
    for category, score in found.summary.scores.items():
        table.add_row(category, percent(score), percent(found.summary.lenient_scores[category]), str(score.n))
    for field, of_value in found.summary.breakdowns.items():
        table.add_section()
        for value, score in of_value.items():
            table.add_row(f"{field}: {value}", percent(score), "", str(score.n))
    return table


# --------------------------------------------------------------------------------------------------------- the parts


def percent(score: Score) -> str:
    """A score with its clustered interval: "61.2 [55.0, 67.1]"."""
    low, high = _interval(score)
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _interval(score: Score) -> tuple[float, float]:
    if score.cluster_low is None or score.cluster_high is None:
        return score.low, score.high
    return score.cluster_low, score.cluster_high


def _scores(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """As the page and the charts want them, with the clustered interval."""
    shown = {}
    for name, score in scores.items():
        low, high = _interval(score)
        shown[name] = {**asdict(score), "low": low, "high": high}
    return shown


def _clustered(found: Outcome) -> dict[str, Any]:
    assert found.summary is not None
    return _scores(found.summary.scores)[OVERALL]


def _majority(outcomes: Sequence[Outcome]) -> float | None:
    known = [found.summary.majority_accuracy for found in outcomes if found.summary is not None]
    return known[0] if known else None


def _rates(outcomes: Sequence[Outcome], results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column for each condition."""
    columns = [_column(found, results["conditions"][found.name]) for found in outcomes]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return ["", *(found.name for found in outcomes)], rows


def _column(found: Outcome, told: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of one condition beside its categories, in percent."""
    failures = ", ".join(f"{count} {kind}" for kind, count in told["failures"].items()) or "none"
    unanswered = {"questions without answer": failures}
    if found.as_wrong and found.failures:
        unanswered["strict, those counted as wrong"] = percent(found.as_wrong[OVERALL])
    summary = found.summary
    if summary is None:
        return unanswered
    column = {
        "strict: what stands in <answer>": percent(summary.scores[OVERALL]),
        "robust: the whole answer": percent(summary.lenient_scores[OVERALL]),
        "questions": str(summary.scores[OVERALL].n),
        "with the think-answer form": f"{100 * summary.format_rate:.1f}",
        "cut off": f"{100 * summary.truncation_rate:.1f}",
        **unanswered,
    }
    if summary.over_majority is not None and summary.majority_accuracy is not None:
        column[f"always {summary.majority_letter}"] = f"{100 * summary.majority_accuracy:.1f}"
        column["strict minus that, in points"] = points(summary.over_majority)
    if told["over_blind"]:
        column["strict minus no video, in points"] = points(Difference(**told["over_blind"]))
    return column


def _comparison(found: Comparison) -> list[SectionPart]:
    rows = [
        [category, points(strict), points(found.robust[category]), str(strict.n), str(strict.won), str(strict.lost)]
        for category, strict in found.strict.items()
    ]
    text = f"{found.second} minus {found.first}, in percentage points on the questions that both answered."
    lists = [f"{name}: {', '.join(ids)}" for name, ids in (("Won", found.won), ("Lost", found.lost)) if ids]
    return [PageTable(["", "strict", "robust", "questions", "won", "lost"], rows), text, *lists]


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    policy, questions = results["policy"], results["questions"]
    shown = {name: of["reading"] for name, of in results["conditions"].items()}
    first = next(iter(shown.values()))
    facts = {
        "model": str(policy["model"]),
        "revision": str(policy["revision"] or "-"),
        "weights": str(policy.get("weights", "-")),
        "engine": str(policy["engine"]),
        "sampling": _told(results["sampling"]),
        "frames": "; ".join(f"{name}: {_told(of['video'])}" for name, of in shown.items() if not of["blind"]),
        "question": first["question_template"],
        "questions": f"{questions['asked']} of {questions['records']} records; {questions['malformed']} malformed",
        "data": questions["fingerprint"],
        "decoder": first["decoder"],
    }
    return {name: value for name, value in facts.items() if value != "-"}


def _told(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def cards(outcomes: Sequence[Outcome], rows: Sequence[Row], count: int) -> list[SampleCard]:
    """Some questions that all conditions answered, always the same ones: every category in turn, wrong answers too."""
    common = [index for index in range(len(rows)) if outcomes and all(index in found.records for found in outcomes)]
    random.Random(0).shuffle(common)
    by_category: dict[str, list[int]] = {}
    for index in common:
        by_category.setdefault(rows[index].category, []).append(index)
    chosen: list[int] = []
    while len(chosen) < min(count, len(common)):
        for waiting in by_category.values():
            chosen += [waiting.pop()] if waiting and len(chosen) < count else []
    return [_card(outcomes, index, rows[index]) for index in chosen]


def _card(outcomes: Sequence[Outcome], index: int, row: Row) -> SampleCard:
    import numpy as np

    from longrl.datamodules.media.sampling import VideoSampling
    from longrl.datamodules.media.video import read_video
    from longrl.types import UnusableSample

    shown: dict[str, Any] = {}
    if row.videos:
        try:
            span = row.metadata.get("span_s")
            rule = VideoSampling(fps=None, num_frames=NUM_CARD_FRAMES, span_s=tuple(span) if span else None)
            frames = read_video(row.videos[0], rule)
            shown = {"frames": np.ascontiguousarray(frames.pixels.permute(0, 2, 3, 1)), "timestamps": frames.timestamps}
        except UnusableSample:  # of an evaluation without video, or one that has ended long ago
            shown = {}
    return sample_card({found.name: found.records[index][0] for found in outcomes}, **shown)
