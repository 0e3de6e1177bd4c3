"""report.html: one file that shows what a run learned; it opens offline and can be mailed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.evaluation import page
from longrl.evaluation.charts import (
    Scores,
    all_categories,
    data_uri,
    figure_png,
    frame_jpeg,
    plot_accuracies,
    png_width,
    run_color,
    run_label,
)
from longrl.evaluation.curves import plot_curves, read_metrics
from longrl.evaluation.grid import Sheet
from longrl.io.atomic import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MAX_FRAMES = 12
"""Of a longer video so many evenly spaced frames are shown."""
_NOT_RUNS = ("seconds",)
"""Keys of results.json that are no run."""


@dataclass(frozen=True)
class CompletionCard:
    """What one run said to a question."""

    run: str
    """Shown as its heading, e.g. "sft"."""
    text: str
    correct: bool | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Part -> value."""
    num_tokens: int | None = None
    finish_reason: str = "stop"


@dataclass(frozen=True)
class SampleCard:
    """One question with its video and what several runs said to it."""

    id: str
    problem: str
    answer: str
    completions: Sequence[CompletionCard]
    category: str = ""
    frames: np.ndarray | None = None
    """[F, H, W, 3] uint8 RGB."""
    timestamps: Sequence[float] = ()
    """[F] seconds; may be empty."""


@dataclass(frozen=True)
class Report:
    """All that a report shows; what is empty is left out.

    Example:
        `write_report("runs/demo", Report("Demo", results, curves={"rl": find_metrics("runs/demo/rl")}, samples=cards))`
    """

    title: str
    results: Mapping[str, Mapping[str, Any]]
    """As in results.json: run -> category -> {"accuracy", "low", "high", "n"}, and "seconds" -> {stage: s}."""
    curves: Mapping[str, str | Path | Sequence[str | Path]] = field(default_factory=dict)
    """Run -> its metrics.csv file or files, earlier versions first."""
    samples: Sequence[SampleCard] = ()
    subtitle: str = ""
    chance: float | None = None
    """Accuracy of the majority answer, a line in the chart."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Command, commit, hardware, ...: name -> value."""
    note: str = "Accuracy in percent with its 95% Wilson interval."
    """Below the results."""
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Heading -> pieces of HTML (`longrl.evaluation.page`), behind the results."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Heading -> a chart, above the pieces of its section."""
    pictures: Sequence[Sheet] = ()
    """Grids of generated pictures or videos, in order: `longrl.evaluation.grid.saved_sheets(run)`."""


def write_report(folder: str | Path, report: Report) -> Path:
    """Writes report.html, and the charts in it as PNG files beside it.

    Returns:
        Path of report.html.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    charts = _charts(report)
    for name, png in charts.items():
        (folder / f"{name}.png").write_bytes(png)
    path = folder / "report.html"
    atomic_write(path, page.page(report.title, _body(report, charts)))
    return path


def sample_card(
    records: Mapping[str, Mapping[str, Any]], frames: np.ndarray | None = None, timestamps: Sequence[float] = ()
) -> SampleCard:
    """A card from what several runs recorded of one question (`longrl.evaluation.records`).

    Args:
        records: run -> record, in the order of their columns; all of one question.
        frames: [F, H, W, 3] uint8 RGB.
        timestamps: [F] seconds.
    """
    if len({record["id"] for record in records.values()}) != 1:
        ids = {run: record["id"] for run, record in records.items()}
        raise ValueError(f"a sample card shows one question, got {ids}; pass each run's record of the same id")
    first = next(iter(records.values()))
    cards = [
        CompletionCard(
            run=run,
            text=record["prediction"],
            correct=record["correct"],
            rewards=record["rewards"],
            num_tokens=record["num_completion_tokens"],
            finish_reason=record["finish_reason"],
        )
        for run, record in records.items()
    ]
    return SampleCard(
        first["id"], first["problem"], first["answer"], cards, first["category"], frames=frames, timestamps=timestamps
    )


def _runs(report: Report) -> dict[str, Scores]:
    return {name: scores for name, scores in report.results.items() if name not in _NOT_RUNS}


def _charts(report: Report) -> dict[str, bytes]:
    """File name without suffix -> PNG."""
    charts = {}
    if runs := _runs(report):
        charts["accuracy"] = figure_png(plot_accuracies(runs, report.chance))
    for run, paths in report.curves.items():
        figure = plot_curves(read_metrics(paths))
        if figure is not None:
            charts[f"curves_{run}"] = figure_png(figure)
    return charts | {_chart_name(heading): figure_png(figure) for heading, figure in report.figures.items()}


def _chart_name(heading: str) -> str:
    return heading.lower().replace(" ", "_")


def _body(report: Report, charts: Mapping[str, bytes]) -> str:
    runs = _runs(report)
    shown = {
        name: page.image(data_uri(png, "png"), name.replace("_", " "), png_width(png) // 3 * 2)
        for name, png in charts.items()
    }
    table = page.score_table(runs, all_categories(runs), run_label) if runs else ""
    note = f'<p class="note">{escape(report.note)}</p>' if runs else ""
    curves = [
        page.section(f"Learning curves: {run_label(run)}", shown.get(f"curves_{run}", "")) for run in report.curves
    ]
    headings = dict.fromkeys([*report.figures, *report.sections])
    more = [
        page.section(heading, shown.get(_chart_name(heading), ""), *report.sections.get(heading, ()))
        for heading in headings
    ]
    cards = "\n".join(_card(sample) for sample in report.samples)
    return "\n".join(
        [
            f"<h1>{escape(report.title)}</h1>",
            f'<p class="lead">{escape(report.subtitle)}</p>' if report.subtitle else "",
            _tiles(report, runs),
            page.section("Results", table, shown.get("accuracy", ""), note),
            *more,
            *curves,
            page.section("Generated pictures", *map(_picture, report.pictures)),
            page.section("Samples", cards),
            page.section("How this was made", page.facts(_facts(report))),
        ]
    )


def _picture(sheet: Sheet) -> str:
    source = data_uri(sheet.image, sheet.kind)
    return page.sheet(sheet.title, page.image(source, sheet.title, sheet.width))


def _tiles(report: Report, runs: Mapping[str, Scores]) -> str:
    tiles = []
    for position, (run, scores) in enumerate(runs.items()):
        if "overall" in scores:
            score = scores["overall"]
            below = f"{100 * score['low']:.0f} to {100 * score['high']:.0f}, n = {score['n']}"
            tiles.append(page.tile(run_label(run), f"{100 * score['accuracy']:.1f} %", below, run_color(run, position)))
    seconds = report.results.get("seconds", {})
    if seconds:
        tiles.append(page.tile("Total time", duration(sum(seconds.values())), "all stages", "#5b6773"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(report: Report) -> dict[str, str]:
    seconds = report.results.get("seconds", {})
    stages = {"time": ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items())} if seconds else {}
    return {**report.facts, **stages}


def _card(sample: SampleCard) -> str:
    head = f"<b>{escape(sample.id)}</b>" + (page.chip(sample.category) if sample.category else "")
    completions = "".join(_completion(card, number) for number, card in enumerate(sample.completions))
    return (
        f'<article class="card"><header>{head}{page.chip(f"answer: {sample.answer}", "good")}</header>'
        f"{_strip(sample)}{page.question(sample.problem, sample.answer)}"
        f'<div class="answers">{completions}</div></article>'
    )


def _completion(card: CompletionCard, position: int) -> str:
    chips = [page.verdict(card.correct), *(page.chip(f"{name} {value:.2f}") for name, value in card.rewards.items())]
    if card.num_tokens is not None:
        chips.append(page.chip(f"{card.num_tokens} tokens"))
    if card.finish_reason == "length":
        chips.append(page.chip("cut off", "bad"))
    color, label = run_color(card.run, position), escape(run_label(card.run))
    return (
        f'<div class="completion" style="--run: {color}"><header><b>{label}</b></header>'
        f"{page.completion_text(card.text)}{' '.join(chips)}</div>"
    )


def _strip(sample: SampleCard) -> str:
    if sample.frames is None or len(sample.frames) == 0:
        return ""
    if sample.frames.ndim != 4 or sample.frames.shape[-1] != 3:
        raise ValueError(
            f"frames must be [F, H, W, 3] uint8, got shape {tuple(sample.frames.shape)}; move the channels last"
        )
    total = len(sample.frames)
    chosen = [index * (total - 1) // max(1, min(total, MAX_FRAMES) - 1) for index in range(min(total, MAX_FRAMES))]
    sources = [data_uri(frame_jpeg(sample.frames[index]), "jpeg") for index in chosen]
    captions = [clock(sample.timestamps[index]) if len(sample.timestamps) else f"frame {index}" for index in chosen]
    return page.frame_strip(sources, captions)


def clock(seconds: float) -> str:
    """Time in a video: "0:07", "12:40", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """How long something took: "8.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
