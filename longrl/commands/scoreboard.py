"""`python -m longrl scoreboard RUN...`: accuracy of evaluations against what they cost, beside published figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from longrl.commands.parsers import ShortErrors
from longrl.evaluation.scoreboard_rows import COSTS, FIELDS, ScoreName

DESCRIPTION = """Writes one page about evaluations: accuracy with clustered intervals against frames, tokens, seconds of
decoding and operations, by category and length, beside what was published; each number with its protocol and command.
A RUN is the folder of `evaluate`, of a run that `test` evaluated, or of several such."""
DEFAULT_OUT = "scoreboard"
"""Folder of the page, in the first run, unless an option names one."""


def main(args: Sequence[str]) -> None:
    """Command line of `scoreboard`."""
    parser = ShortErrors(prog="python -m longrl scoreboard", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of evaluations, or folders that hold some")
    published = "YAML files of published figures, or folders of them; configs/published/ has some"
    parser.add_argument("--published", nargs="+", default=[], metavar="FILE", help=published)
    parser.add_argument("--cost", choices=COSTS, default="frames", help="what accuracies are drawn against")
    parser.add_argument("--score", choices=list(FIELDS), default="strict", help="which score is shown")
    parser.add_argument("--title", default="Scoreboard", help="title of the page")
    parser.add_argument("--out", help=f"folder of the page; {DEFAULT_OUT}/ in the first RUN when left out")
    options = parser.parse_args(list(args))
    path = make_scoreboard(options.runs, options.published, options.cost, options.score, options.title, options.out)
    sys.stdout.write(f"scoreboard: {path}\nresults: {path.with_suffix('.json')}\n")


def make_scoreboard(
    runs: Sequence[str],
    published: Sequence[str] = (),
    cost: str = "frames",
    score: ScoreName = "strict",
    title: str = "Scoreboard",
    out: str | None = None,
) -> Path:
    """Writes scoreboard.html, scoreboard.md and scoreboard.json.

    Args:
        runs: folders of evaluations, or folders that hold some.
        published: YAML files of published figures, or folders of them.
        cost: what accuracies are drawn against, one of `COSTS`.
        score: `strict`, `robust` or `protocol`.
        title: of the page.
        out: folder; `scoreboard` in the first run when left out.

    Returns:
        Path of the page.

    Raises:
        ValueError: a run has no results, or a file of published figures is not as it should be.
    """
    from longrl.evaluation.published_figures import read_published
    from longrl.evaluation.scoreboard import Scoreboard
    from longrl.evaluation.scoreboard_page import write_scoreboard
    from longrl.evaluation.scoreboard_rows import find_evaluations, read_groups

    figures = read_published(published)
    groups = read_groups(find_evaluations(runs), score)
    folder = Path(out) if out else Path(runs[0]) / DEFAULT_OUT
    return write_scoreboard(folder, Scoreboard(groups, figures, cost), title)
