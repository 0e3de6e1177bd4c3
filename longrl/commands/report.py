"""`python -m longrl report`: the curves of one training run and the pictures it generated, as one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from longrl.evaluation.curves import find_metrics
from longrl.evaluation.report_page import Report, write_report
from longrl.evaluation.sample_grids import saved_grids
from longrl.evaluation.samples import RESULTS_FILE


def main(args: Sequence[str]) -> None:
    """Command line of `report_run`."""
    from jsonargparse import auto_cli

    from longrl.commands.parsers import ShortErrors

    path = auto_cli(
        report_run, args=list(args), as_positional=False, parser_class=ShortErrors, prog="python -m longrl report"
    )
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
    metrics = find_metrics(run)
    pictures = saved_grids(run, count=num_sheets)
    if not metrics and not pictures:
        raise ValueError(f"--run={run} holds neither a metrics.csv nor pictures; name the run_dir of a training run")
    if (Path(run) / RESULTS_FILE).is_file():
        raise ValueError(
            f"--run={run} holds the results of an evaluation ({RESULTS_FILE}), whose report.html would be replaced; "
            "move them to a folder of their own"
        )
    name = Path(run).resolve().name
    curves = {name: metrics} if metrics else {}
    return write_report(run, Report(title or name, curves=curves, pictures=pictures, facts={"run": run}))
