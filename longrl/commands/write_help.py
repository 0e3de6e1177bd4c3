"""`python -m longrl.commands.write_help`: writes the pages that `--help` prints, from the parsers as they are.

Run it after an option, its description, a class that a config can name, or help_heads.yaml changed; a test compares.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NoReturn
from unittest.mock import patch

import yaml
from jsonargparse import ArgumentParser

from longrl.commands.aliases import aliases_of
from longrl.commands.help_text import (
    WIDTH,
    Option,
    files_by_class,
    first_sentence,
    import_classes,
    known_classes,
    options_of,
    plain,
    render_classes,
    sections_of,
)
from longrl.commands.main import call
from longrl.commands.parsers import ShortErrors, described_fields, subparsers
from longrl.commands.show_help import SECTIONS, page_file

_TEXTS = yaml.safe_load(files(__package__).joinpath("help_heads.yaml").read_text())
HEADS: Mapping[str, Mapping[str, Any]] = _TEXTS["commands"]
"""Command -> sentence, usage, examples and common options."""
WORDS: Mapping[str, str] = _TEXTS["words"]
"""Common option -> what it is, in the few words that a line has room for."""
NEEDED = {"replay": ["record"], "report": ["run"], "compare": ["a", "b"], "pipeline": ["split"]}
"""What a command wants before it makes its parser, or none."""


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
    options = options_of_command(command)
    prefix = "diffusion_" if command.startswith("diffusion ") else ""
    shared = {}
    own = [head(command, options)]
    named = files_by_class()
    known = known_classes(options, named)
    parts = sections_of(options) | ({"classes": render_classes(known, named)} if known else {})
    for group, text in parts.items():
        name = next((name for name in (prefix + group, group) if name in SECTIONS.get(command, ())), None)
        if name is None:
            own.append(text)
        else:
            shared[name] = text
    return {command: "\n".join(own), **shared}


def options_of_command(command: str) -> list[Option]:
    """The options of a command, as its parser stands when it would parse them."""
    args = [*command.split(), *NEEDED.get(command, [])]
    with described_fields(), patch.object(ShortErrors, "parse_args", _stop_with):
        try:
            call(args[0], args)
        except _Ready as ready:
            return options_of(next(iter(subparsers(ready.parser, command.split()[-1:])), ready.parser))
    raise AssertionError(f"{command} has parsed nothing")


class _Ready(Exception):
    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


def _stop_with(parser: ArgumentParser, *args: Any, **options: Any) -> NoReturn:
    raise _Ready(parser)


def head(command: str, options: Sequence[Option] = ()) -> str:
    """The first screen: what the command does, how it is called, an example, and what most people set."""
    texts = HEADS[command]
    lines = [f"usage: {texts['usage']}", "", *textwrap.wrap(texts["says"], WIDTH), "", "example:"]
    lines += [f"  {line}" for line in texts["example"].splitlines()]
    if "common" in texts:
        known = {option.name.removeprefix("--"): option for option in options}
        missing = [name for name in texts["common"] if name not in known]
        if missing:
            raise ValueError(f"help_heads.yaml has {missing} in `common` of {command}, which has no such options")
        lines += ["", "options that most people set, with their short names:"]
        short = {option: f"--{name}" for name, option in aliases_of(command).items()}
        lines += [_common(name, short.get(name, ""), known[name].help) for name in texts["common"]]
    if command in SECTIONS:
        takes = "rollout.engine" if "rollout" in SECTIONS[command] else "model.family"
        lines += [
            "",
            "Below: all options; the classes that an option can name; and the options of data, model, rollout,",
            "checkpoint, watchdog and trainer.",
            f"`python -m longrl {command} --{takes}.help CLASS` lists what a class takes.",
        ]
    return "\n".join([*lines, ""])


def _common(name: str, short: str, text: str) -> str:
    said = WORDS.get(name) or first_sentence_of(plain(text))
    return f"  --{name:<39} {short:<14} {textwrap.shorten(said, WIDTH - 57, placeholder=' ...')}".rstrip()


def first_sentence_of(text: str) -> str:
    """A description's first sentence."""
    return first_sentence(type("Described", (), {"__doc__": text}))


if __name__ == "__main__":
    main()
