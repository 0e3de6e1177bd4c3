"""`python -m longrl compare RUN_A RUN_B`: what a second run gains over a first, question by question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from longrl.commands.parsers import ShortErrors
from longrl.evaluation.comparison import Comparison, compare_folders
from longrl.evaluation.result_files import write_new_json
from longrl.io.tables import make_table

DESCRIPTION = """Compares two runs on the questions that both answered: the difference of their accuracies with its 95%
interval, clustered by video, which is much sharper than two separate intervals. A run is the folder of `evaluate`, or
of a run that `test` evaluated."""
MAX_LISTED = 20


def main(args: Sequence[str]) -> None:
    """Command line of `compare`."""
    parser = ShortErrors(prog="python -m longrl compare", description=DESCRIPTION)
    parser.add_argument("run_a", help="folder of the first run")
    parser.add_argument("run_b", help="folder of the second, whose gain is shown")
    parser.add_argument("--out", help="write everything to this JSON file too")
    options = parser.parse_args(list(args))
    comparisons = compare_folders(options.run_a, options.run_b)
    show_comparisons(comparisons)
    if options.out:
        content = {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()}
        write_new_json(options.out, content, "--out")


def show_comparisons(comparisons: dict[str, Comparison]) -> None:
    """Prints a table for each condition, the questions that changed, and what was not asked alike."""
    console = Console(width=110)
    for condition, item in comparisons.items():
        title = f"{item.second} minus {item.first} ({condition})"
        console.print(make_table(["", "strict", "robust", "n", "won", "lost"], item.table_rows(), title))
        for text, ids in (("won", item.won), ("lost", item.lost)):
            if ids:
                more = f" and {len(ids) - MAX_LISTED} more" if len(ids) > MAX_LISTED else ""
                console.print(f"{text}: {', '.join(ids[:MAX_LISTED])}{more}", highlight=False)
        for text in item.differences:
            console.print(f"not asked alike: {text}", highlight=False, soft_wrap=True)
        if item.left_out:
            console.print(f"{item.left_out} questions are left out: only one run answered them, or they differ")
