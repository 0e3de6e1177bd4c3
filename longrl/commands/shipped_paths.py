"""Files of longrl that a command line or a config names, found from any working folder (longrl/io/shipped_files.py).

What exists in the working folder is left as it is. Of the rest, `configs/trainer/node.yaml` and the like become the
place of the file that ships, and `--config NAME` the recipe of that name. Saved configs have the names, not the places.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from pathlib import Path
from typing import Any

from longrl.io.shipped_files import (
    YAML,
    find_recipe,
    find_shipped,
    missing,
    missing_recipe,
    name_of,
    place_of,
    place_of_part,
)

CONFIG_FLAGS = ("--config", "-c")
RECIPE_FOLDERS = {"evaluate": "configs/eval", "pipeline": "longvideo-reason/configs"}
"""Where a command's own recipes are; of the others it is `configs`."""
WRITES = ("out", "run_dir", "json", "profile")
"""Options that name what a command writes."""
_names_stay = ContextVar("names_stay", default=False)


def with_shipped_files(args: Sequence[str]) -> list[str]:
    """A command line whose options name shipped files by their places.

    Args:
        args: the command and its options; values in front of the first option are no files.

    Raises:
        ValueError: a config, or a YAML file below `configs/`, is neither here nor shipped; near names are told.
    """
    command = args[0] if args else ""
    found: list[str] = []
    flag = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if not arg.startswith("-"):
            found.append(_place(flag, arg, command))
        elif equals:
            found.append(f"{name}={_place(name, value, command)}")
        else:
            found.append(arg)
        flag = name if arg.startswith("-") else flag
    return found


def with_shipped_values(value: Any, working_folder: Path) -> Any:
    """What a YAML text holds, with shipped files by their places.

    Values that end in .yaml are looked for beside the file that names them, which jsonargparse makes the current folder
    while it reads that; all others in the working folder.

    Args:
        value: a mapping, list or scalar, with any of these inside.
        working_folder: the user's.
    """
    if isinstance(value, dict):
        written = {name: item for name, item in value.items() if name in WRITES}
        return {name: with_shipped_values(item, working_folder) for name, item in value.items()} | written
    if isinstance(value, list):
        return [with_shipped_values(item, working_folder) for item in value]
    if not isinstance(value, str) or _names_stay.get():
        return value
    return place_of_part(value, working_folder) if value.endswith(YAML) else place_of(value, working_folder)


@contextmanager
def names_stay() -> Iterator[None]:
    """Leaves names as they are within: a parser that writes a config reads the parts of what it has written again."""
    token = _names_stay.set(True)
    try:
        yield
    finally:
        _names_stay.reset(token)


def with_names(value: Any) -> Any:
    """A parsed config with shipped files by their names again, as somebody would write it on another machine."""
    if isinstance(value, Namespace):
        named = copy(value)
        vars(named).update({name: with_names(item) for name, item in vars(value).items()})
        return named
    if isinstance(value, dict):
        return {name: with_names(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_names(item) for item in value]
    return name_of(value) if isinstance(value, str) else value


def _place(flag: str, value: str, command: str) -> str:
    """The value of an option, as a place if it names a file that ships."""
    if flag in CONFIG_FLAGS:
        return _config_place(value, command)
    if not flag.startswith("--") or flag.rpartition(".")[2].removeprefix("--") in WRITES:
        return value
    place = place_of(value)
    if place == value and value.startswith("configs/") and value.endswith(YAML) and find_shipped(value) is None:
        raise ValueError(f"{flag} {missing(value)}")
    return place


def _config_place(value: str, command: str) -> str:
    """The value of `--config`: a file, or the name of a recipe."""
    if not value or any(mark in value for mark in "\n{:") or os.path.isfile(os.path.expanduser(value)):
        return value
    found = find_recipe(value, RECIPE_FOLDERS.get(command, "configs"))
    if found is None:
        raise ValueError(f"--config {missing_recipe(value)}")
    return place_of(found)
