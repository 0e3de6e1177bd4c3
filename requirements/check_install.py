"""Resolves README's install lines for every Python that longrl supports, on Linux x86-64; installs and builds nothing.

A line fails if its requirements contradict each other, or if a package has no wheel for that Python: what must be built
on the user's machine does not belong in a line that is to work at once. `requirements/gpu.lock` must moreover name all
that it brings in. uv resolves, for it reads metadata alone, and markers as the named Python would; pip takes those of
the Python that it runs in, and downloads wheels of 3 GiB where an index serves no metadata.

    pip install uv && python requirements/check_install.py
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_35"
"""Ubuntu 22.04's glibc; vLLM's own requirements have no wheels for older ones than 2.31."""
AFTERWARDS = "--no-build-isolation"
"""Marks a line that builds against what an earlier one has installed: there is nothing in it to resolve beforehand."""


class Unresolved(ValueError):
    """Requirements that no set of wheels fulfils."""


def install_lines(document: str) -> list[str]:
    """Arguments of every `pip install` in the code blocks of a Markdown document, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.removeprefix("pip install ") for line in lines if line.startswith("pip install ")]


def requirements_of(line: str, project: Mapping) -> list[str]:
    """What a line asks the index for; `.` stands for what pyproject.toml declares.

    Args:
        line: arguments of `pip install`.
        project: the table of pyproject.toml.

    Raises:
        ValueError: it names an extra that pyproject.toml has not, or an option that is not known here.
    """
    requirements: list[str] = []
    words = line.replace('"', "").replace("'", "").split()
    depends = "--no-deps" not in words
    for place, word in enumerate(words):
        if word == "-r":
            requirements += _lines_of(ROOT / words[place + 1])
        elif word.startswith("."):
            requirements += _declared(word, project) if depends else []
        elif word.startswith("-"):
            if word not in ("-e", "--no-deps", AFTERWARDS):
                raise ValueError(
                    f"pip install {line}: requirements/check_install.py does not know {word}; add it there"
                )
        elif place == 0 or words[place - 1] != "-r":
            requirements.append(word)
    return requirements


def _declared(word: str, project: Mapping) -> list[str]:
    """`.[a,b]` -> dependencies of the project and of both extras."""
    extras = project["optional-dependencies"]
    named = re.findall(r"[\w-]+", word)
    unknown = [name for name in named if name not in extras]
    if unknown:
        raise ValueError(f"{word} names {unknown[0]!r}, but the extras are {', '.join(extras)}")
    return [*project["dependencies"], *(text for name in named for text in extras[name])]


def _lines_of(file: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def resolve(requirements: Sequence[str], python: str, cache: str | None = None) -> list[str]:
    """Pins `name==version` of a set of wheels that fulfils the requirements.

    Args:
        requirements: as pip reads them.
        python: version of the Python, e.g. `3.12`.
        cache: folder of metadata; several calls may share one.

    Raises:
        Unresolved: there is none; says why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-build"]
    command += ["--python-version", python, "--python-platform", PLATFORM, "-"]
    environment = os.environ | ({"UV_CACHE_DIR": cache} if cache else {})
    given = "\n".join(requirements)
    result = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unresolved(f"Python {python}: {result.stderr.strip()}")
    return [line for line in result.stdout.splitlines() if "==" in line]


def check_line(line: str, project: Mapping, python: str, cache: str) -> None:
    """Raises Unresolved if a line cannot be installed; else says how much it brings in."""
    requirements = requirements_of(line, project)
    if not requirements:  # the project alone, behind a lock
        return
    try:
        pins = resolve(requirements, python, cache)
    except Unresolved as error:
        raise Unresolved(f"pip install {line}\n{error}") from error
    print(f"Python {python}: pip install {line}: {len(pins)} packages", flush=True)


def check_lock(lock: Path, python: str, cache: str) -> None:
    """Raises Unresolved if pins contradict each other, have no wheel for this Python, or need what is not named."""
    pins = _lines_of(lock)
    more = {_name(pin) for pin in resolve(pins, python, cache)} - {_name(pin) for pin in pins}
    if more:
        raise Unresolved(f"Python {python}: {lock.name} does not pin {', '.join(sorted(more))}")


def _name(pin: str) -> str:
    return re.split(r"[=\[; ]", pin)[0].lower().replace("_", "-").replace(".", "-")


def main() -> None:
    """Checks gpu.lock and every line with every Python; exits with 1 and the reason at the first one that fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = dict.fromkeys(install_lines((ROOT / "README.md").read_text()))
    lines = [line for line in named if AFTERWARDS not in line and "gpu.lock" not in line]
    with tempfile.TemporaryDirectory() as cache:
        for python in PYTHONS:
            check_lock(ROOT / "requirements" / "gpu.lock", python, cache)
            for line in lines:
                check_line(line, project, python, cache)


if __name__ == "__main__":
    try:
        main()
    except Unresolved as error:
        sys.exit(f"requirements/check_install.py: {error}")
