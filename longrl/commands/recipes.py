"""`python -m longrl recipes`: configs, launch scripts and prompts that ship with longrl, listed, shown and copied."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import NoReturn

from longrl.io.disk_space import check_writable
from longrl.io.recipe_heads import read_head
from longrl.io.shipped_files import YAML, missing_recipe, recipe_name, shipped_files, shipped_root
from longrl.io.text_files import read_utf8

DESCRIPTION = """Configs, launch scripts and prompts that ship with longrl.

  longrl recipes list              recipes of whole runs: what each is, and what it needs
  longrl recipes list WORD         everything whose name or description has a word, such as eval, gspo or slurm
  longrl recipes show NAME         a file as it ships
  longrl recipes copy NAME [TO]    a copy to edit, with its comments; TO is a file or a folder

A NAME is a path below configs/ without .yaml, as for `--config NAME`, or the path of any file or folder that ships.
"""
SHOWN = (*YAML, ".sh", ".sbatch")
"""Files that begin with a comment about themselves."""
WIDTH = 118
PART = re.compile(r"^(?P<key>\s*(?:- |[\w.]+: )+)(?P<file>[\w./-]+\.ya?ml)\b", re.MULTILINE)
"""A value of a recipe that is another file, found from the recipe's folder."""


class OneLineErrors(ArgumentParser):
    """A parser whose errors are those of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"recipes: {message}; `longrl recipes --help` says how")


def main(args: Sequence[str]) -> None:
    """Command line of `recipes`."""
    parser = OneLineErrors("longrl recipes", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | show | copy")
    listed = commands.add_parser("list", help="what ships")
    listed.add_argument("word", nargs="?", metavar="WORD", help="of a name or a description")
    shown = commands.add_parser("show", help="print a file")
    copied = commands.add_parser("copy", help="copy a file or a folder, to edit it")
    for one in (shown, copied):
        one.add_argument("name", metavar="NAME", help="of a recipe, or the path of a file that ships")
    copied.add_argument("to", nargs="?", metavar="TO", help="file or folder; by default its own name, here")
    options = parser.parse_args(args or ["--help"])
    if options.command == "list":
        sys.stdout.write(listing(options.word))
    elif options.command == "show":
        sys.stdout.write(read_utf8(shipped_root() / _named(options.name)))
    else:
        sys.stdout.write(copy_recipe(options.name, options.to))


def listing(word: str | None = None) -> str:
    """Text of `recipes list`.

    Args:
        word: of a name or a description, in any case; None gives the recipes of whole runs.

    Raises:
        ValueError: nothing has this word.
    """
    entries = []
    for name in shipped_files():
        if name.endswith(SHOWN) and (word is not None or (name.count("/") == 1 and name.startswith("configs/"))):
            head = read_head(shipped_root() / name)
            if word is None or word.lower() in f"{name} {head.summary}".lower():
                lines = [recipe_name(name), head.summary, head.needs and f"needs: {_without_asides(head.needs)}"]
                entries.append("\n    ".join(shorten(line, WIDTH, placeholder=" ...") for line in lines if line))
    if not entries:
        raise ValueError(
            f"no file of longrl has {word!r} in its name or description; `longrl recipes list` has recipes"
        )
    return "\n".join([*entries, "", *([_parts()] if word is None else []), _how_to_use(word)]) + "\n"


def _without_asides(text: str) -> str:
    return re.sub(r" \([^()]*\)", "", text)


def _parts() -> str:
    """What ships besides recipes of whole runs, by folder."""
    counts: dict[str, int] = {}
    for name in shipped_files():
        first, folder, *rest = name.split("/")
        key = f"{folder}/" if first == "configs" else f"{first}/"
        if name.endswith(SHOWN) and (rest or first != "configs"):
            counts[key] = counts.get(key, 0) + 1
    shown = ", ".join(f"{folder} {count}" for folder, count in counts.items())
    return f"parts, evaluations and scripts, by `longrl recipes list WORD`: {shown}"


def _how_to_use(word: str | None) -> str:
    copy = "edit a copy: `longrl recipes copy NAME`"
    if word is None:
        return f"run one by `longrl fit --config NAME`, or {copy}"
    part = "name a part by its option behind one, such as `--model.algorithm configs/algorithm/gspo.yaml`"
    return f"run a recipe by `longrl fit --config NAME`; {part}; {copy}"


def copy_recipe(name: str, to: str | None = None) -> str:
    """Copies a file or folder that ships.

    A recipe's parts, found from its own folder, are named from the root of what ships in the copy: there they are the
    working folder's, or those that ship.

    Args:
        name: of a recipe, or the path of a file or folder.
        to: a file, or a folder that is there or ends in `/`; by default the working folder.

    Returns:
        What was written, and the command that uses it.

    Raises:
        ValueError: nothing of this name ships, or the place is taken.
    """
    found = _named(name, folders=True)
    source = shipped_root() / found
    place = Path(to or ".")
    if place.is_dir() or str(to).endswith("/"):
        place = place / source.name
    if place.exists():
        raise ValueError(
            f"{place} is there already, and is not replaced; name another place: longrl recipes copy {name} TO"
        )
    if source.is_file() and place.suffix != source.suffix:
        raise ValueError(f"the copy of {found} must end in {source.suffix!r}, got {place}; a folder ends in /")
    check_writable(str(place.parent), "TO")
    if source.is_dir():
        shutil.copytree(source, place)
        for file in filter(lambda path: path.suffix in YAML, source.rglob("*")):
            copy = place / file.relative_to(source)
            copy.write_text(_from_anywhere(read_utf8(file), file, beside=source), encoding="utf-8")
        return f"wrote {place}/\n"
    if source.suffix not in YAML:
        shutil.copy(source, place)  # a script stays one that can be run
        return f"wrote {place}; the comment at its top says how it is used\n"
    as_typed = shlex.quote(str(place))
    place.write_text(_from_anywhere(read_utf8(source), source).replace(found, as_typed), encoding="utf-8")
    launch = read_head(place).launch
    is_recipe = as_typed in launch
    used = f"run it:  {launch}" if is_recipe else "a part of a recipe: the comment at its top says where it goes"
    return f"wrote {place}\n{used}\n"


def _from_anywhere(text: str, source: Path, beside: Path | None = None) -> str:
    """A recipe's text whose parts are named from the root of what ships.

    Args:
        text: of the file.
        source: the file.
        beside: a folder whose files are copied along, and keep their names.
    """

    def named(found: re.Match[str]) -> str:
        file = (source.parent / found["file"]).resolve()
        stays = not file.is_file() or (beside is not None and file.is_relative_to(beside))
        return f"{found['key']}{found['file'] if stays else file.relative_to(shipped_root()).as_posix()}"

    return PART.sub(named, text)


def _named(name: str, folders: bool = False) -> str:
    """The file that a name means, as the repository has it; with `folders` also a folder.

    Raises:
        ValueError: there is none; near names are told.
    """
    path, files = name.rstrip("/"), shipped_files()
    if folders and any(file.startswith(f"{path}/") for file in files):
        return path
    named = (path, *(f"{folder}{path.removesuffix('.yaml')}.yaml" for folder in ("configs/", "")))
    found = next((file for file in named if file in files), None)
    if found is None:
        raise ValueError(missing_recipe(name))
    return found
