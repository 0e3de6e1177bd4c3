"""`python -m longrl own-answers`: what a run answered best, as records for SFT, or right and wrong answers as pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from longrl.commands.parsers import ShortErrors
from longrl.evaluation.own_answers import ChoiceRules, choose_records, find_answers
from longrl.io.functions import import_function, search_working_folder
from longrl.io.jsonl import write_jsonl
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.types import Row

DESCRIPTION = """Makes records to train on of a run's own answers, which `predict`, `test` or `evaluate` has sampled,
several to each question: pairs of right and wrong ones for data.stage=preference, or right ones for data.stage=sft
(rejection sampling). docs/preferences.md has the commands."""


def main(args: Sequence[str]) -> None:
    """Command line: where answers and questions are, and the fields of `ChoiceRules`."""
    from longrl.datamodules.longvideo_reason import DEFAULT_ROW_FUNCTION
    from longrl.datamodules.rows.question_rows import ROW_ARGUMENTS, make_rows
    from longrl.datamodules.rows.sources import media_root_of, read_records

    parser = ShortErrors(prog="python -m longrl own-answers", description=DESCRIPTION)
    parser.add_argument("--run", type=str, required=True, help="folder of the run, or of its answers")
    parser.add_argument("--questions", type=str, required=True, help="what was asked: data.test of that command")
    parser.add_argument("--out", type=str, required=True, help="file to write, a record on each line")
    parser.add_argument("--condition", type=str | None, default=None, help="which of several an evaluation has")
    parser.add_argument(
        "--row_function", type=str, default=DEFAULT_ROW_FUNCTION, help="data.row_function, as it was asked with"
    )
    parser.add_argument("--media_root", type=str | None, default=None, help="data.media_root, as it was asked with")
    parser.add_argument("--max_rows", type=int | None, default=None, help="data.max_eval_rows, as it was asked with")
    parser.add_class_arguments(ChoiceRules)
    options = parser.parse_args(list(args)).as_dict()
    run, source, out, condition = (options.pop(name) for name in ("run", "questions", "out", "condition"))
    path, given_root, max_rows = (options.pop(name) for name in ("row_function", "media_root", "max_rows"))
    rules = ChoiceRules(**options)
    check_ranges({"max_rows": max_rows}, "--", max_rows=COUNT)
    if Path(out).exists():
        raise ValueError(f"--out={out} is there already; name another file, or move it away")

    search_working_folder()
    lines = find_answers(run, condition)
    root = given_root or media_root_of(source)
    made = make_rows(read_records(source), import_function(path, "--row_function", ROW_ARGUMENTS), root)
    rows = [row for row in made[:max_rows] if isinstance(row, Row)]
    chosen = choose_records(lines, rows, rules, root)
    if not chosen.records:
        raise ValueError(f"no answer of {run} is taken by these rules: {chosen.summary()}; sample more, or relax them")
    write_jsonl(out, chosen.records)
    show_summary(chosen.summary(), out, rules, root)


def show_summary(summary: dict[str, float], out: str, rules: ChoiceRules, root: str | None) -> None:
    """What became of the answers, and the options that read the records."""
    lines = [f"{name}: {value:g}" for name, value in summary.items()]
    stage = "preference" if rules.kind == "pairs" else "sft"
    where = "" if root is None else f" --data.media_root {root}"
    lines.append(f"written: {out}; train on it by --data.train {out} --data.stage {stage}{where}")
    sys.stdout.write("\n".join([*lines, ""]))
