"""What `doctor` has found out: one line each, with a state and what helps. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "warning", "broken"]
"""`missing` is optional; `warning` runs, though not as it should; with `broken` no run starts."""


@dataclass(frozen=True)
class Finding:
    """One fact about an installation or its machine."""

    section: str
    """Heading that it stands under."""
    name: str
    value: str
    state: State = "ok"
    remedy: str = ""
    """What helps; a command where there is one."""


def guarded(section: str, name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a warning if the check itself fails, for the machine may be half broken."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(section, name, f"could not be checked: {described(error)}", "warning")


def described(error: BaseException) -> str:
    """An error in one line: its kind, and the first line of what it says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return f"{kind}: {first}" if first else kind


def can_fit(findings: Iterable[Finding]) -> bool:
    """Whether `fit` can run: nothing that it needs is broken."""
    return all(finding.state != "broken" for finding in findings)
