"""`python -m longrl pipeline STEP`: from video files to a data set, each step a command that may be killed at any time.

A step computes its file anew from the file of the step before and from the replies on disk, and asks for what is
missing. So the same command goes on where it was killed, tries again what failed, and does nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from longrl.commands.closing import longrl, say_end, without_next
from longrl.commands.failures import keep_tracebacks_in
from longrl.commands.main import COMMAND_USAGE
from longrl.io.progress import item_progress
from longrl.io.tables import make_table
from longrl.pipeline.config import PipelineConfig
from longrl.pipeline.step_run import MORE_STEPS, STEPS, StepReport, StepRun, Workspace

DESCRIPTION = f"""From videos to a data set of questions with reasoning; longvideo-reason/README.md explains.
STEP is one of {", ".join((*STEPS, *MORE_STEPS))}, or `all`: all but {" and ".join(MORE_STEPS)}."""
WITHOUT_MODEL = ("split", "validate", "export")


def main(args: Sequence[str]) -> None:
    """Command line: a step, and the options of `PipelineConfig`."""
    from longrl.commands.parsers import ShortErrors
    from longrl.commands.run_config import set_config_reader

    set_config_reader()
    usage = COMMAND_USAGE.format("python -m longrl", "pipeline STEP")
    parser = ShortErrors(usage=usage, prog="python -m longrl pipeline STEP", description=DESCRIPTION)
    parser.add_argument("--config", action="config", help="a YAML file; later ones win, key by key")
    parser.add_class_arguments(PipelineConfig)
    if not args or args[0] in ("-h", "--help"):
        parser.print_help()
        return
    step, *rest = args
    if step not in (*STEPS, *MORE_STEPS, "all"):
        names = ", ".join((*STEPS, *MORE_STEPS))
        raise ValueError(f"unknown step {step!r} of `pipeline`; choose one of {names}, all")
    values = parser.instantiate(parser.parse_args(rest))
    config = PipelineConfig(**{name: value for name, value in vars(values).items() if name != "config"})
    keep_tracebacks_in(config.out)
    steps = STEPS if step == "all" else (step,)
    for name in steps[:-1]:
        with without_next():
            run_step(config, name)
    run_step(config, steps[-1])


def run_step(config: PipelineConfig, step: str) -> StepReport:
    """Runs a step with a progress bar, and shows and writes its report.

    Raises:
        ValueError: an earlier step is missing, an endpoint is not set or refuses every call, the budget is spent, or
            too much failed. What was answered until then is on disk.
    """
    from longrl.chat.client import ReplyCache
    from longrl.pipeline import captions, dataset_export, difficulty, questions, splitting, traces, validation

    work: Callable[[StepRun], None] = {
        "split": splitting.split_into_clips,
        "caption": captions.caption_clips,
        "timeline": captions.write_timelines,
        "question": questions.write_questions,
        "validate": validation.validate_questions,
        "rewrite": questions.rewrite_reasoning,
        "filter": difficulty.filter_questions,
        "export": dataset_export.export_dataset,
        "trace": traces.write_traces,
    }[step]
    workspace, report = Workspace(config.out), StepReport(step, config.max_failed_share)
    replies = None if step in WITHOUT_MODEL else ReplyCache(workspace.path("responses"), config.budget)
    try:
        with item_progress() as progress:
            task = progress.add_task(step, total=0)

            def add_items(count: int) -> None:
                progress.update(task, total=(progress.tasks[task].total or 0) + count)

            work(StepRun(config, workspace, report, replies, add_items, lambda: progress.advance(task)))
    finally:
        if replies is not None:
            replies.log.close()
        workspace.write_report(report)
        show_report(report)
    say_step(config, step, workspace.path("dataset"))
    return report


def say_step(config: PipelineConfig, step: str, dataset: Path) -> None:
    """Where a step's result is, and the next one, or training behind the last."""
    if step in STEPS[:-1]:
        following = STEPS[STEPS.index(step) + 1]
        say_end([f"written: {config.out}"], [f"python -m longrl pipeline {following}, with the same options"])
    elif step == "export":
        rows = longrl("fit", "--config", "RECIPE.yaml", "--stage", "sft", "--train", dataset / "sft.jsonl")
        say_end([f"data set: {dataset} (sft.jsonl, rl.jsonl, eval.jsonl, README.md)"], [rows])


def show_report(report: StepReport) -> None:
    """The summary table of a step."""
    from rich.console import Console

    always = {"items": report.items, "done": report.done}
    others = (
        {"failed": report.failed, "left (budget)": report.left} | dict(sorted(report.counts.items())) | report.calls
    )
    shown = always | {name: value for name, value in others.items() if value}
    Console().print(make_table(["step " + report.step, ""], [(name, f"{value:g}") for name, value in shown.items()]))
