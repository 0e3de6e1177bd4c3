"""Asks the probes of `doctor` in child processes: one that aborts or hangs takes nothing but itself along."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from longrl.commands.doctor_findings import Finding
from longrl.commands.doctor_probes import failed

TIMEOUT_S = 120.0
"""Of one child; a network disk may take that long to give libraries for the first time."""
COMMAND = (sys.executable, "-m", "longrl.commands.doctor_probes")


def ask_children(names: Sequence[str], command: Sequence[str] = COMMAND, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Findings of all probes. One child answers them in turn; behind a probe that ended it another child goes on.

    Args:
        names: of probes, from `probe_names`.
        command: that answers the names behind it.
        timeout_s: how long a child may take.
    """
    findings: list[Finding] = []
    left = list(names)
    while left:
        answers, ending = _ask_child([*command, *left], timeout_s)
        for answer in answers:
            findings += answer
        left = left[len(answers) :]
        if left:
            findings.append(failed(left.pop(0), ending))
    return findings


def _ask_child(command: Sequence[str], timeout_s: float) -> tuple[list[list[Finding]], str]:
    """The answers of one child, and how it ended."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        output, errors, code = result.stdout, result.stderr, result.returncode
        ending = _describe_end(code, errors.decode(errors="replace"))
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        ending = f"took longer than {timeout_s:g} s"
    return list(_answers(output)), ending


def _answers(output: bytes) -> Iterator[list[Finding]]:
    for line in output.decode(errors="replace").splitlines():
        try:
            yield [Finding(**values) for values in json.loads(line)]
        except ValueError:  # half a line, of a child that was ended
            return


def _describe_end(code: int, errors: str) -> str:
    how = f"ends Python by {signal.Signals(-code).name}" if code < 0 else f"ends Python with status {code}"
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("frame #")]
    telling = [line for line in lines if line.startswith("what():")] or lines[-1:]
    return f"{how}: {telling[0]}" if telling else how
