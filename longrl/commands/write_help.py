"""`python -m longrl.commands.write_help`: writes the pages that `--help` prints, from the parsers as they are.

Run it after an option, its description, a class that a config can name, or help_heads.yaml changed; a test compares.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import yaml
from jsonargparse import ArgumentParser

from longrl.commands.help_text import (
    WIDTH,
    files_by_class,
    first_sentence,
    import_classes,
    known_classes,
    options_of,
    plain,
    render_classes,
    sections_of,
)
from longrl.commands.main import dispatch
from longrl.commands.parsers import ShortErrors, read_descriptions, subparsers
from longrl.commands.show_help import SECTIONS, page_file

HEADS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("help_heads.yaml").read_text())
"""Command -> sentence, usage, examples and common options."""
NEEDED = {"replay": ["record"], "report": ["run"], "compare": ["a", "b"], "pipeline": ["split"]}
"""What a command wants before it makes its parser, or none."""
CONFIGS = Path(__file__).parents[2] / "configs"


def main() -> None:
    """Writes all pages anew."""
    for name, text in pages().items():
        page_file(name).parent.mkdir(exist_ok=True)
        page_file(name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page_file(name)}\n")


def pages(commands: Sequence[str] | None = None) -> dict[str, str]:
    """The pages of commands, and the sections that they share.

    Args:
        commands: by default all.

    Raises:
        ValueError: two commands would share a section and differ in it.
    """
    import_classes()
    read_descriptions()
    written: dict[str, str] = {}
    for command in HEADS if commands is None else commands:
        for name, text in pages_of(command).items():
            if written.setdefault(name, text) != text:
                raise ValueError(f"{command} differs from other commands in its section {name}; give it one of its own")
    return written


def pages_of(command: str) -> dict[str, str]:
    """A command's own page, and its sections that it shares with others."""
    if command == "diffusion":
        return {command: head(command)}
    parser = parser_of(command)
    prefix = "diffusion_" if command.startswith("diffusion ") else ""
    shared = {}
    own = [head(command, parser)]
    named = files_by_class(CONFIGS)
    known = known_classes(parser, named)
    parts = sections_of(parser) | ({"classes": render_classes(known, named)} if known else {})
    for group, text in parts.items():
        name = next((name for name in (prefix + group, group) if name in SECTIONS.get(command, ())), None)
        if name is None:
            own.append(text)
        else:
            shared[name] = text
    return {command: "\n".join(own), **shared}


def parser_of(command: str) -> ArgumentParser:
    """The parser of a command, as it stands when the command would parse its options."""
    args = [*command.split(), *NEEDED.get(command, [])]
    with patch.object(ShortErrors, "parse_args", _stop_with):
        try:
            dispatch(args[0], args)
        except _Ready as ready:
            return next(iter(subparsers(ready.parser, command.split()[-1:])), ready.parser)
    raise AssertionError(f"{command} has parsed nothing")


class _Ready(Exception):  # noqa: N818
    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


def _stop_with(parser: ArgumentParser, *args: Any, **options: Any) -> NoReturn:
    raise _Ready(parser)


def head(command: str, parser: ArgumentParser | None = None) -> str:
    """The first screen: what the command does, how it is called, an example, and what most people set."""
    texts = HEADS[command]
    lines = [f"usage: {texts['usage']}", "", *textwrap.wrap(texts["says"], WIDTH), "", "example:"]
    lines += [f"  {line}" for line in texts["example"].splitlines()]
    if parser is not None and "common" in texts:
        known = {option.name.removeprefix("--"): option for option in options_of(parser)}
        missing = [name for name in texts["common"] if name not in known]
        if missing:
            raise ValueError(f"help_heads.yaml has {missing} in `common` of {command}, which has no such options")
        lines += ["", "options that most people set:"]
        lines += [_common(f"--{name}", known[name].help) for name in texts["common"]]
    if command in SECTIONS:
        takes = "rollout.engine" if "rollout" in SECTIONS[command] else "model.family"
        lines += [
            "",
            "Below: all options; the classes that an option can name; and the options of data, model, rollout,",
            "checkpoint, watchdog and trainer.",
            f"`python -m longrl {command} --{takes}.help CLASS` lists what a class takes.",
        ]
    return "\n".join([*lines, ""])


def _common(name: str, text: str) -> str:
    return f"  {name:<41}{textwrap.shorten(first_sentence_of(plain(text)), WIDTH - 43, placeholder=' ...')}"


def first_sentence_of(text: str) -> str:
    """A description's first sentence."""
    return first_sentence(type("Described", (), {"__doc__": text}))


if __name__ == "__main__":
    main()
