"""report.html: one file that shows what a run learned; it opens offline and can be mailed.

What stands where is in templates/report.html.jinja; this file says what a report holds.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from longrl.evaluation.charts import all_categories, plot_accuracies, run_color, run_label
from longrl.evaluation.curves import plot_curves, read_metrics
from longrl.evaluation.scores import Scores
from longrl.evaluation.turn_cards import CallCard, TurnCard
from longrl.io.atomic import atomic_write
from longrl.io.progress import duration
from longrl.types import Row

MAX_FRAMES = 12
"""Evenly spaced frames that are shown of a longer video."""
FRAME_HEIGHT = 180
"""Pixels; higher frames are made smaller."""


@dataclass(frozen=True)
class Picture:
    """An image on the page."""

    alt: str
    content: bytes
    """Bytes of its file."""
    width: int
    """Pixels on the page, where there is room."""
    kind: Literal["png", "webp"] = "png"
    title: str = ""
    """Text above it."""
    is_chart: bool = False
    """Dark on white; a page on a dark screen shows it the other way round."""


@dataclass(frozen=True)
class PageTable:
    """A table; its first column is on the left."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Mapping[str, Any] | None]]
    """Cells: a text, a score with `accuracy`, `low` and `high`, or None for nothing."""
    wraps: bool = False
    """Cells are texts of several lines."""
    dense: bool = False
    """It has many columns: smaller letters, less room between them."""


SectionPart = str | PageTable | Picture
"""A text is a paragraph."""


@dataclass(frozen=True)
class SampleCard:
    """One question with its video and the first completion of several runs."""

    row: Row
    """The question."""
    lines: Mapping[str, Mapping[str, Any]]
    """Run, shown as a heading, e.g. "sft" -> its line of samples.jsonl, in the order of their columns."""
    frames: np.ndarray | None = None
    """[F, H, W, 3] uint8 RGB."""
    timestamps: Sequence[float] = ()
    """[F] seconds; may be empty."""
    turns: Mapping[str, Sequence[TurnCard]] = field(default_factory=dict)
    """Run -> the turns of that completion, if it has several."""


@dataclass(frozen=True)
class Report:
    """Content of a report; what is empty is left out.

    Example:
        `write_report("runs/demo", Report("Demo", results, curves={"rl": find_metrics("runs/demo/rl")}, samples=cards))`
    """

    title: str
    results: Mapping[str, Scores] = field(default_factory=dict)
    """Run -> category -> {"accuracy", "low", "high", "n"}."""
    curves: Mapping[str, str | Path | Sequence[str | Path]] = field(default_factory=dict)
    """Run -> its metrics.csv file or files, earlier versions first."""
    samples: Sequence[SampleCard] = ()
    subtitle: str = ""
    chance: float | None = None
    """Accuracy of the majority answer, a line in the chart."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> how long it took."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Command, commit, hardware, ...: name -> value."""
    note: str = "Accuracy in percent with its 95% Wilson interval."
    """Below the results."""
    sections: Mapping[str, Sequence[SectionPart | Figure]] = field(default_factory=dict)
    """Heading -> what stands behind the results; a figure is saved as a file named after the heading."""
    pictures: Sequence[Picture] = ()
    """Grids of generated pictures or videos, and of what tools showed, in order:
    `longrl.evaluation.sample_grids.saved_grids(run)`."""


def write_report(folder: str | Path, report: Report, file: str = "report.html") -> Path:
    """Writes report.html, or a file of another name, and the charts in it as PNG files beside it.

    Returns:
        Path of the page.
    """
    folder = Path(folder)
    sections: dict[str, list[SectionPart]] = {}
    if report.results:
        accuracies = plot_accuracies(report.results, report.chance)
        scores = score_table(report.results, all_categories(report.results))
        sections["Results"] = [scores, _saved_chart(folder, "accuracy", accuracies), report.note]
    for heading, parts in report.sections.items():
        name = re.sub(r"\W+", "_", heading.lower())  # a run may be called a/b
        sections[heading] = [_saved_chart(folder, name, part) if isinstance(part, Figure) else part for part in parts]
    for run, paths in report.curves.items():
        figure = plot_curves(read_metrics(paths))
        if figure is not None:
            sections[f"Learning curves: {run_label(run)}"] = [_saved_chart(folder, f"curves_{run}", figure)]
    sections["Pictures"] = list(report.pictures)
    facts = dict(report.facts)
    if report.seconds:
        facts["time"] = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())
    template = _environment().get_template("report.html.jinja")
    return atomic_write(folder / file, template.render(report=report, sections=sections, facts=facts))


def score_table(runs: Mapping[str, Scores], categories: Sequence[str]) -> PageTable:
    """Accuracies in percent: a row per category, a column per run."""
    rows: list[list[str | Mapping[str, Any] | None]] = []
    for name in categories:
        scores = [by_category.get(name) for by_category in runs.values()]
        num_questions = max((int(score["n"]) for score in scores if score is not None), default=0)
        rows.append([name, str(num_questions), *scores])
    return PageTable(["category", "questions", *map(run_label, runs)], rows)


def _saved_chart(folder: Path, name: str, figure: Figure) -> Picture:
    """A chart as `NAME.png` in the folder, and on the page at two thirds of its pixels, sharp on any screen."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a category or a run may be called $\x$, which is no formula
    figure.savefig(buffer, format="png", facecolor="white")
    png = buffer.getvalue()
    atomic_write(folder / f"{name}.png", png)
    width = int.from_bytes(png[16:20], "big")  # of the file's header
    return Picture(name.replace("_", " "), png, width // 3 * 2, is_chart=True)


# ---- what the template asks for ----


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("longrl.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (call_strip, data_uri, duration, frame_strip, mark_answer, mark_question, run_color, run_label):
        environment.filters[function.__name__] = function
    return environment


def data_uri(image: bytes, kind: str) -> str:
    """Image bytes as the `src` of an `img`, so that the page needs no other file; kind is "png", "jpeg" or "webp"."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def clock_time(seconds: float) -> str:
    """Time in a video: "0:07", "12:40", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def frame_strip(card: SampleCard) -> list[dict[str, str]]:
    """Evenly spaced frames of a card, each with its `source` for an `img` and its time as `caption`."""
    if card.frames is None:
        return []
    if card.frames.ndim != 4 or card.frames.shape[-1] != 3:
        raise ValueError(
            f"frames must be [F, H, W, 3] uint8, got shape {tuple(card.frames.shape)}; move the channels last"
        )
    figures = []
    for index in evenly_spaced(len(card.frames), MAX_FRAMES):
        caption = clock_time(card.timestamps[index]) if len(card.timestamps) else f"frame {index}"
        figures.append(_figure(Image.fromarray(card.frames[index]), caption))
    return figures


def call_strip(call: CallCard) -> list[dict[str, str]]:
    """Frames that a call showed, as those of `frame_strip`; their times to a tenth, for clips are short."""
    return [_figure(image, f"{time_s:.1f} s") for image, time_s in call.frames]


def _figure(image: Image.Image, caption: str) -> dict[str, str]:
    image.thumbnail((image.width, FRAME_HEIGHT), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return {"source": data_uri(buffer.getvalue(), "jpeg"), "caption": caption}


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of `total` indices, the first and the last among them."""
    shown = min(total, count)
    return [index * (total - 1) // max(1, shown - 1) for index in range(shown)]


def mark_question(card: SampleCard) -> Markup:
    """The question as the model reads it, the line of the right option set off."""
    is_right = re.compile(rf"\s*\(?{re.escape(card.row.answer.strip())}\s?[).:]")
    gold = Markup('<span class="gold">{} \u2713</span>')
    problem = card.row.problem.strip().splitlines()
    lines = [gold.format(line) if is_right.match(line) else escape(line) for line in problem]
    return Markup("\n").join(lines)


def mark_answer(text: str) -> Markup:
    """A completion with its tags faint and the answer strong."""
    said = r'\1<span class="said">\2</span>\3'
    # An answer ends at the next tag that opens one: so no tag is searched from more than once.
    content = r"((?:(?!&lt;answer&gt;).)*?)"
    answer = rf"(&lt;answer&gt;){content}(&lt;/answer&gt;)"
    marked = re.sub(answer, said, str(escape(text.strip())), flags=re.DOTALL)
    marked = re.sub(r"(&lt;/?(?:think|answer)&gt;)", r'<span class="tag">\1</span>', marked)
    return Markup(marked or "(empty)")
