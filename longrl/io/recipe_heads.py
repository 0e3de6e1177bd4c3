"""What the comments at the top of a file that ships say of it: what it is, what it needs, the command that runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NO_SENTENCE = re.compile(r"$|Needs: |  ")
"""What follows the sentences at the top: an empty line, what the recipe needs, or a command, which is indented."""
NOT_INDENTED = re.compile(r"\S|$")
COMMAND = re.compile(r"(Launch:)?\s*(python -m longrl .*)")


@dataclass(frozen=True)
class RecipeHead:
    """The head of a recipe, a part or a script."""

    summary: str
    """Its first sentence; empty where the file begins without a comment."""
    needs: str
    """Hardware, weights and data; empty where it says nothing of them."""
    launch: str
    """The first command that runs it; empty where it is only laid over others."""


def read_head(path: Path) -> RecipeHead:
    """The head of a YAML file or a shell script."""
    lines = _comment_lines(path.read_text(encoding="utf-8"))
    opening = " ".join(_until(lines, NO_SENTENCE))
    summary = re.split(r"(?<=\.) (?=[A-Z`])", opening)[0]
    start = next((at for at, line in enumerate(lines) if line.startswith("Needs: ")), len(lines))
    needs = [*lines[start : start + 1], *_until(lines[start + 1 :], NOT_INDENTED)]
    commands = [found for found in map(COMMAND.match, lines) if found is not None]
    commands.sort(key=lambda found: found[1] is None)  # what is launched, before what prepares it
    launch = commands[0][2].rstrip(" \\") if commands else ""
    return RecipeHead(summary.rstrip(":"), " ".join(map(str.strip, needs)).removeprefix("Needs: "), launch)


def _comment_lines(text: str) -> list[str]:
    """The lines of the comment that a file begins with, without `# `."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#!"):
            found.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return found


def _until(lines: list[str], end: re.Pattern[str]) -> list[str]:
    """The lines before the first one that begins as `end`."""
    return lines[: next((at for at, line in enumerate(lines) if end.match(line)), len(lines))]
