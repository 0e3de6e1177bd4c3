"""`python -m longrl report RUN [RUN ...]`: what training runs learned, one of them or several side by side, as HTML."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from longrl.commands.parsers import ShortErrors
from longrl.evaluation.curves import PANELS, find_metrics, matching_columns
from longrl.evaluation.overlaid_curves import plot_overlaid
from longrl.evaluation.report_page import PageTable, Picture, Report, SectionPart, write_report
from longrl.evaluation.run_records import RunRecord, differences, final_value, read_run, seconds_per_step, short_names
from longrl.evaluation.sample_grids import saved_grids
from longrl.evaluation.samples import RESULTS_FILE
from longrl.evaluation.screen import number
from longrl.evaluation.staleness_chart import AVERAGED_STEPS, plot_staleness
from longrl.evaluation.timeline import BusyShares, busy_shares, read_timeline
from longrl.evaluation.timeline_chart import LAST_STEPS, plot_timeline
from longrl.turns import restored_turn, turns_text

DESCRIPTION = """Writes report.html of one training run into its folder: curves, alerts, final values, samples. Of
several runs it writes one page on which their curves lie over one another, with what differs in their configs."""
MAX_TEXT = 700
"""Characters of a completion, and of the end of a question, that are shown."""
Sections = dict[str, Sequence[SectionPart | Figure]]


def main(args: Sequence[str]) -> None:
    """Command line of `report_run` and `compare_runs`."""
    parser = ShortErrors(prog="python -m longrl report", description=DESCRIPTION)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a training run")
    parser.add_argument("--run", action="append", default=[], help="the same as RUN; may be given several times")
    parser.add_argument("--title", help="title of the page; the names of the runs when left out")
    parser.add_argument("--num_sheets", type=int, default=3, help="grids of generated pictures that are shown")
    parser.add_argument("--out", help="folder of the page of several runs; comparison/ in the first one when left out")
    options = parser.parse_args(list(args))
    runs = [*options.runs, *options.run]
    if not runs:
        parser.error("name the folder of a run, or of several to compare them")
    if len(runs) == 1 and options.out is None:
        path = report_run(runs[0], options.title, options.num_sheets)
    else:
        path = compare_runs(runs, options.title, options.out, options.num_sheets)
    sys.stdout.write(f"report: {path}\n")


def report_run(run: str, title: str | None = None, num_sheets: int = 3) -> Path:
    """Writes report.html, and the charts in it, into the folder of a training run.

    Args:
        run: folder of the run.
        title: of the page; the folder's name when left out.
        num_sheets: grids of generated pictures that are shown, of training and of validation each.

    Returns:
        Path of report.html.

    Raises:
        ValueError: the run has left neither metrics nor pictures.
    """
    _check_run(run, num_sheets)
    if (Path(run) / RESULTS_FILE).is_file():
        raise ValueError(
            f"--run={run} holds the results of an evaluation ({RESULTS_FILE}), whose report.html would be replaced; "
            "move them to a folder of their own"
        )
    name = Path(run).resolve().name
    metrics = find_metrics(run)
    curves = {name: metrics} if metrics else {}
    pictures = saved_grids(run, count=num_sheets)
    report = Report(
        title or name, curves=curves, pictures=pictures, sections=_sections([read_run(run)]), facts={"run": run}
    )
    return write_report(run, report)


def compare_runs(runs: Sequence[str], title: str | None = None, out: str | None = None, num_sheets: int = 3) -> Path:
    """Writes one page about several training runs: curves over one another, and tables with a column for each.

    Args:
        runs: their folders.
        title: of the page; the names of the runs when left out.
        out: folder of the page; `comparison` in the first run when left out.
        num_sheets: grids of generated pictures that are shown of each run.

    Returns:
        Path of report.html.

    Raises:
        ValueError: a run has left neither metrics nor pictures, or is named twice.
    """
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise ValueError(f"each run is named once, got {', '.join(runs)}")
    for run in runs:
        _check_run(run, num_sheets)
    records = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    figure = plot_overlaid({record.name: record.metrics for record in records})
    sections: Sections = {"Learning curves": [figure]} if figure is not None else {}
    pictures: list[Picture] = []
    for record in records:
        for grid in saved_grids(record.folder, count=num_sheets):
            pictures.append(Picture(grid.alt, grid.content, grid.width, grid.kind, f"{record.name}: {grid.title}"))
    report = Report(
        title or " and ".join(record.name for record in records),
        sections=sections | _sections(records),
        pictures=pictures,
        facts={record.name: str(record.folder) for record in records},
    )
    return write_report(out or Path(runs[0]) / "comparison", report)


def _check_run(run: str, num_sheets: int) -> None:
    if num_sheets < 0:
        raise ValueError(f"--num_sheets must be at least 0, got {num_sheets}")
    if not find_metrics(run) and not saved_grids(run, count=1):
        raise ValueError(f"--run={run} {_why_empty(Path(run))}")


def _why_empty(run: Path) -> str:
    """Why there is nothing to report of a folder, and what helps."""
    if not run.is_dir():
        return "is no folder; name the run_dir of a training run"
    if any(run.rglob("events.out.tfevents.*")):
        return (
            "holds metrics for TensorBoard alone; look at them by `tensorboard --logdir`, this page reads metrics.csv"
        )
    if (run / "config.yaml").is_file():
        return "holds a run without a step that was logged: wait for its first one, or look at what ended it"
    return "holds neither a metrics.csv nor pictures; name the run_dir of a training run"


# ---- sections ----


def _sections(runs: Sequence[RunRecord]) -> Sections:
    """What runs have beside their curves; a section without content is left out."""
    head = [run.name for run in runs]
    final, speed = _final_rows(runs), _speed_rows(runs)
    sections: Sections = {}
    alerts = _alert_rows(runs)
    if alerts:
        sections["Alerts"] = [PageTable(["run", "step", "alert", "likely cause", "what helps"], alerts, wraps=True)]
    if final:
        sections["Final values"] = [PageTable(["metric", *head], final), "Mean of the last ten values of each."]
    sections |= _timelines(runs)
    if speed:
        note = "Of a step the median, of all else the mean; memory in GiB."
        sections["Speed and memory"] = [PageTable(["", *head], speed), note]
    if len(runs) > 1:
        rows = differences(runs)
        table = PageTable(["setting", *head], rows, wraps=True)
        sections["What differs in the configs"] = [table] if rows else ["Nothing but their folders."]
    samples = _sample_rows(runs)
    if samples:
        sections["Last samples"] = [PageTable(["run", "step", "question", "completion", "reward"], samples, wraps=True)]
    return sections


def _timelines(runs: Sequence[RunRecord]) -> Sections:
    """The last steps of each run drawn to scale, the shares of the time that both sides were busy, and tokens' ages."""
    sections: Sections = {}
    for run in runs:
        of_run = "" if len(runs) == 1 else f": {run.name}"
        steps = read_timeline(run.folder)
        figure = plot_timeline(steps)
        if figure is not None:
            shown = busy_shares(steps[-LAST_STEPS:])
            rows = [_share_row("steps drawn", shown), _share_row("all steps", busy_shares(steps))]
            table = PageTable(["", "trainer busy", "engine busy", "both idle", "seconds"], rows)
            sections[f"Timeline{of_run}"] = [figure, table]
        staleness = plot_staleness(run.metrics)
        if staleness is not None:
            sections[f"Staleness{of_run}"] = [staleness, f"Means of the last {AVERAGED_STEPS} steps."]
    return sections


def _share_row(name: str, shares: BusyShares) -> list[str | None]:
    percents = [f"{100 * share:.0f} %" for share in (shares.trainer, shares.engine, shares.both_idle)]
    return [name, *percents, number(shares.seconds)]


def _alert_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    return [
        [run.name, str(alert.step), f"{alert.rule.name}: {alert.what}", alert.rule.cause, alert.rule.knob]
        for run in runs
        for alert in run.alerts
    ]


def _final_rows(runs: Sequence[RunRecord]) -> list[list[str | None]]:
    """The metrics of all curves but times, and what validation says."""
    shown: dict[str, None] = {}
    for panel in PANELS:
        for run in runs:
            shown |= dict.fromkeys(matching_columns(run.metrics, panel) if panel.kind != "stacked" else ())
    for run in runs:
        shown |= dict.fromkeys(name for name in run.metrics if re.match(r"val/[^/]+$", name))
    return [[name, *(_cell(final_value(run.metrics.get(name, {}))) for run in runs)] for name in shown]


def _speed_rows(runs: Sequence[RunRecord]) -> list[list[str | None]]:
    rows: list[list[str | None]] = [["last step", *(str(run.num_steps) for run in runs)]]
    rows.append(["seconds per step", *(_cell(seconds_per_step(run.metrics)) for run in runs)])
    shown = re.compile(r"time/(?!step$)|throughput/|memory/")
    names = dict.fromkeys(name for run in runs for name in run.metrics if shown.match(name))
    rows += [[name, *(_cell(mean(run.metrics.get(name, {}))) for run in runs)] for name in names]
    return [row for row in rows if any(cell is not None for cell in row[1:])]


def mean(points: Mapping[int, float]) -> float:
    """Of all values; nan of none."""
    return math.fsum(points.values()) / len(points) if points else math.nan


def _cell(value: float) -> str | None:
    return number(value) if math.isfinite(value) else None


def sample_text(sample: Mapping[str, Any]) -> str:
    """What a sample says, in all its turns if it has several."""
    if not sample.get("turns"):
        return str(sample["completion"])
    return turns_text([restored_turn(turn) for turn in sample["turns"]])


def _sample_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    rows = []
    for run in runs:
        for sample in run.samples:
            question, reward = str(sample.get("problem", "")), sample.get("reward", "")
            text = sample_text(sample)
            rows.append(
                [
                    run.name,
                    str(sample.get("step", "")),
                    question if len(question) <= MAX_TEXT else f"...{question[-MAX_TEXT:]}",
                    text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...",
                    number(reward) if isinstance(reward, int | float) else str(reward),
                ]
            )
    return rows
