"""`python -m longrl doctor`: what this installation and this machine can do, what is missing, and what adds it.

It imports nothing heavy itself, so that it also answers where torch does not load.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import longrl
from longrl.commands.doctor_child import ask_children
from longrl.commands.doctor_findings import Finding, can_fit, guarded
from longrl.commands.doctor_machine import check_machine, check_variables, nvidia_driver
from longrl.commands.doctor_probes import probe_names
from longrl.io.exit_codes import MISTAKE

DESCRIPTION = """Checks the installation and the machine: versions against the ranges that longrl allows, GPUs, the
kernels and decoders that a run will use, memory, disk, caches. Says what is missing and the command that adds it. Ends
with 0 if `fit` can run, with 1 if something that it needs is broken."""
EXAMPLE = "example: python -m longrl doctor --json doctor.json"
COLOURS = {"ok": "green", "missing": "cyan", "warning": "yellow", "broken": "red"}


def main(args: Sequence[str]) -> None:
    """Command line of `doctor`."""
    parser = _Parser(prog="python -m longrl doctor", description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("--network", choices=("true", "false"), default="false", help="also ask the hub for an answer")
    parser.add_argument("--json", metavar="FILE", help="write all findings to this file too")
    options = parser.parse_args(list(args))
    findings = examine(network=options.network == "true")
    show(findings)
    if options.json:
        _write_json(Path(options.json), findings)
    if not can_fit(findings):
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as those of all commands; the others' parsers import Lightning."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"longrl: error: {message}\n")
        sys.exit(MISTAKE)


def examine(network: bool = False) -> list[Finding]:
    """All findings about this installation and machine.

    Args:
        network: ask the hub whether it answers.
    """
    probes = ["hub and network" if name == "hub" and network else name for name in probe_names()]
    probed = ask_children(probes)
    return [
        *guarded("packages", "packages", lambda: _check_packages(nvidia_driver() is not None)),
        *probed,
        *guarded("machine", "machine", check_machine),
        *guarded("variables", "variables", check_variables),
    ]


def _check_packages(has_gpu: bool) -> list[Finding]:
    from longrl.commands.doctor_packages import check_packages  # needs `packaging`, which may be missing too

    return list(check_packages(has_gpu))


def show(findings: Sequence[Finding]) -> None:
    """Prints tables on a terminal, and plain lines elsewhere; then what follows of them."""
    if sys.stdout.isatty():
        _print_tables(findings)
    else:
        sys.stdout.write("\n".join(plain_lines(findings)) + "\n")
    sys.stdout.write(f"\n{verdict(findings)}\n")


def plain_lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding under the heading of its section."""
    lines: list[str] = []
    width = max((len(finding.name) for finding in findings), default=0)
    for section, of_section in itertools.groupby(findings, lambda finding: finding.section):
        lines.append(f"\n{section}" if lines else section)
        for finding in of_section:
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            lines.append(f"  {finding.state:<7}  {finding.name:<{width}}  {finding.value}{remedy}")
    return lines


def verdict(findings: Sequence[Finding]) -> str:
    """Whether `fit` can run; if not, what is broken and what mends it."""
    num_warnings = sum(finding.state == "warning" for finding in findings)
    if can_fit(findings):
        warned = f"; {num_warnings} warning{'' if num_warnings == 1 else 's'} above" if num_warnings else ""
        return f"fit can run here{warned}"
    broken = [finding for finding in findings if finding.state == "broken"]
    lines = [
        f"  {finding.name}: {finding.value}{f'; {finding.remedy}' if finding.remedy else ''}" for finding in broken
    ]
    return "\n".join(["fit cannot run here:", *lines])


def _print_tables(findings: Sequence[Finding]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        sys.stdout.write("\n".join(plain_lines(findings)) + "\n")
        return
    console = Console()
    for section, of_section in itertools.groupby(findings, lambda finding: finding.section):
        table = Table(section, "", "", "", box=box.SIMPLE_HEAD, header_style="bold")
        for finding in of_section:
            state = Text(finding.state, style=COLOURS[finding.state])
            table.add_row(Text(finding.name), state, Text(finding.value), Text(finding.remedy))
        console.print(table)


def _write_json(path: Path, findings: Sequence[Finding]) -> None:
    content = {
        "longrl": longrl.__version__,
        "can_fit": can_fit(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json={path} cannot be written ({error.strerror}); name another file") from error
