"""Faults tried for real: what goes wrong in a run, what its user sees, and what is kept.

Each row is a tiny run (or several) of the real command line on the CPU, in a process of its own, with one thing broken:
`bench/fault_cases/` has them by area. `as_documented` tells whether exit code, message, lost steps and time are those
that the documents promise; the command fails if one is not. `--quick` leaves out what takes more than some seconds.

    python bench/faults.py --json bench/results/faults.json
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: one thread suits the tiny models
    os.environ.setdefault(variable, "1")

from common import ROOT, console, parse_arguments, report  # noqa: E402
from fault_cases.fault import Fault, try_out  # noqa: E402

CASES = Path(__file__).with_name("fault_cases")


def all_faults() -> list[Fault]:
    """The faults of all files of `fault_cases`, by kind."""
    modules = [importlib.import_module(f"fault_cases.{path.stem}") for path in sorted(CASES.glob("*.py"))]
    faults = [fault for module in modules for fault in getattr(module, "FAULTS", [])]
    return sorted(faults, key=lambda fault: fault.kind)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the table; exits with 1 if a row is not as documented."""
    arguments = parse_arguments(__doc__ or "", argv)
    rows = [run_in_folder(fault) for fault in chosen(arguments)]
    report(__file__, arguments, rows)
    departures = [str(row["fault"]) for row in rows if not row["as_documented"]]
    if departures:
        sys.exit(f"not as documented: {'; '.join(departures)}")
    console.print(f"{len(rows)} faults, all as documented")


def chosen(arguments: argparse.Namespace) -> list[Fault]:
    """All faults, or the quick ones."""
    return [fault for fault in all_faults() if fault.quick or not arguments.quick]


def run_in_folder(fault: Fault) -> dict[str, int | float | str | bool]:
    """The row of a fault, tried in a folder of its own."""
    console.print(f"{fault.kind}: {fault.fault}", soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="longrl-fault-", ignore_cleanup_errors=True) as folder:
        row = try_out(fault, Path(folder))
    # What is published names no folder of the machine that it ran on.
    named = {name: str(row[name]).replace(folder, "FOLDER").replace(f"{ROOT}/", "") for name in ("seen", "kept")}
    return row | named


if __name__ == "__main__":
    main()
