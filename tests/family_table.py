"""`python -m tests.family_table`: the table of families (docs/families.md), from the marks of the tests that are there.

A tick is a test that pytest collects and that says which cell it proves (tests/families.py); without the test, no tick.
`--list` names the tests of every cell. It takes vLLM to collect all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "families.md"
BEGIN = "<!-- families: python -m tests.family_table writes what is between these two lines -->"
END = "<!-- end of families -->"
Proofs = dict[tuple[str, str], list[str]]
"""{(family, claim): tests}."""


class Collector:
    """A plugin of pytest that notes the marks."""

    def __init__(self) -> None:
        self.proofs: Proofs = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("proves"):
                claim, *names = mark.args
                for name in names:
                    self.proofs[name, claim].append(item.nodeid)


def collected() -> Proofs:
    """What the tests prove; reads the files that name the mark's helpers."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "tests.families" in file.read_text()]
    found = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", f"--rootdir={ROOT}", *files], [found])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(said.getvalue())
    return found.proofs


def table(proofs: Proofs) -> str:
    """Markdown: a family per row, a claim per column, and what a tick stands for."""
    from tests.families import CLAIMS, FAMILIES, SEEING

    lines = [f"| family | {' | '.join(CLAIMS)} |", f"|{'---|' * (len(CLAIMS) + 1)}"]
    for name, family in FAMILIES.items():
        cells = ["yes" if proofs.get((name, claim)) else "" for claim in CLAIMS]
        if name not in SEEING:
            cells[list(CLAIMS).index("cached features")] = "-"
        lines.append(f"| {family.label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- **{claim}**: {meaning}." for claim, meaning in CLAIMS.items())])


def filled(readme: str, proofs: Proofs) -> str:
    """The page with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"docs/families.md lacks {BEGIN!r} or {END!r}"
    return f"{before}{BEGIN}\n{table(proofs)}\n{END}{after}"


def main() -> None:
    """Writes the table into docs/families.md, or lists what stands behind it."""
    parser = argparse.ArgumentParser(prog="python -m tests.family_table", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the tests of every cell, and write nothing")
    options = parser.parse_args()
    proofs = collected()
    if not options.list:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), proofs))
        return
    for (name, claim), tests in sorted(proofs.items()):
        functions = dict.fromkeys(re.sub(r"\[.*", "", test) for test in tests)
        sys.stdout.write(f"{name}, {claim}: {', '.join(functions)}\n")


if __name__ == "__main__":
    main()
