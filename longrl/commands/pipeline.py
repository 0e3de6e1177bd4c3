"""`python -m longrl pipeline STEP`: from video files to a data set, each step a command that may be killed at any time.

A step computes its file anew from the file of the step before and from the replies on disk, and asks for what is
missing. So the same command goes on where it was killed, tries again what failed, and does nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longrl.pipeline.config import PipelineConfig
from longrl.pipeline.workspace import STEPS, Report, Workspace

if TYPE_CHECKING:
    from rich.progress import Progress

    from longrl.chat.client import ReplyCache

logger = logging.getLogger(__name__)

DESCRIPTION = f"""From videos to a data set of questions with reasoning; longvideo-reason/README.md explains.
STEP is one of {", ".join(STEPS)}, or `all`."""
WITHOUT_MODEL = ("split", "validate", "export")


def main(args: Sequence[str]) -> None:
    """Command line: a step, and the options of `PipelineConfig`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m longrl pipeline STEP", description=DESCRIPTION)
    parser.add_argument("--config", action="config", help="a YAML file; later ones win, key by key")
    parser.add_class_arguments(PipelineConfig)
    if not args or args[0] in ("-h", "--help"):
        parser.print_help()
        return
    step, *rest = args
    if step not in (*STEPS, "all"):
        raise ValueError(f"unknown step {step!r} of `pipeline`; choose one of {', '.join(STEPS)}, all")
    values = parser.instantiate(parser.parse_args(rest))
    values.pop("config")
    run(PipelineConfig(**values.as_dict() if hasattr(values, "as_dict") else vars(values)), step)


def run(config: PipelineConfig, step: str) -> list[Report]:
    """Runs one step, or all.

    Raises:
        ValueError: an earlier step is missing, an endpoint is not set or refuses every call, the budget is spent, or
            too much failed. What was answered until then is on disk.
    """
    return [run_step(config, name) for name in (STEPS if step == "all" else (step,))]


def run_step(config: PipelineConfig, step: str) -> Report:
    """One step, with a progress bar, a summary and `reports/STEP.json`."""
    workspace, report = Workspace(config.out), Report(step, config.max_failed_share)
    try:
        with _progress() as progress:
            work(config, workspace, report, _advance(progress, step))
    finally:
        workspace.write_report(report)
        show(report)
    return report


def work(config: PipelineConfig, workspace: Workspace, report: Report, advance: Callable[[int], Any]) -> None:
    """Does a step."""
    from longrl.pipeline import captions, dataset_export as export, difficulty, questions, splitting, validation

    if report.step in WITHOUT_MODEL:
        plain = {"split": splitting.split, "validate": validation.validate, "export": export.export}
        plain[report.step](config, workspace, report, advance)
        return
    asking = {
        "caption": captions.caption,
        "timeline": captions.timeline,
        "question": questions.question,
        "rewrite": questions.rewrite,
        "filter": difficulty.filter_questions,
    }
    replies = _replies(config, workspace)
    try:
        asking[report.step](config, workspace, replies, report, advance)
    finally:
        replies.log.close()


def _replies(config: PipelineConfig, workspace: Workspace) -> ReplyCache:
    from longrl.chat.client import ReplyCache

    return ReplyCache(str(workspace.path("responses")), config.budget)


# --------------------------------------------------------------------------------------------------------- the console


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)


def _advance(progress: Progress, step: str) -> Callable[[int], Any]:
    """A function that adds items to the bar (n > 0) or finishes one (0)."""
    task = progress.add_task(step, total=0)

    def advance(count: int) -> None:
        if count:
            progress.update(task, total=(progress.tasks[task].total or 0) + count)
        else:
            progress.advance(task)

    return advance


def show(report: Report) -> None:
    """The summary table of a step."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step " + report.step, "", title=None)
    for name, value in (
        ("items", report.items),
        ("done", report.done),
        ("failed", report.failed),
        ("left (budget)", report.left),
        *sorted(report.counts.items()),
        *report.calls.items(),
    ):
        if value or name in ("items", "done"):
            table.add_row(name, f"{value:g}")
    Console().print(table)
