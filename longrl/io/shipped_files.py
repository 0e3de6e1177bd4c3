"""Files that ship with longrl: recipes and parts in `configs/`, scripts in `launch/`, prompts in `longvideo-reason/`.

In a checkout they lie beside the package, in an installed wheel in `longrl/shipped/`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

FOLDERS = ("configs", "launch", "longvideo-reason")
"""What ships, by its name in the repository."""
YAML = (".yaml", ".yml")
PACKAGE = Path(__file__).resolve().parents[1]
_names: dict[str, str] = {}
"""Places of shipped files that were found outside the working folder -> what they were called."""


def shipped_root() -> Path:
    """The folder with `FOLDERS`: the checkout that longrl is imported from, or the one in an installed package."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def shipped_files() -> list[str]:
    """Names of all files that ship, as the repository has them."""
    root = shipped_root()
    files = (path for name in FOLDERS for path in (root / name).rglob("*") if path.is_file())
    return sorted(path.relative_to(root).as_posix() for path in files if "__pycache__" not in path.parts)


def find_shipped(path: str | Path, working_folder: Path | None = None) -> Path | None:
    """A file or folder in the working folder, or of this name among the shipped ones; None where neither has it.

    Args:
        path: as the repository has it, `configs/trainer/cpu.yaml`. One that exists in the working folder is returned
            as it was given.
        working_folder: that of the user, where the process is in another one.
    """
    path = Path(path)
    if os.path.exists((working_folder or Path()) / os.path.expanduser(path)):  # False of what can be no path
        return path
    if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0] not in FOLDERS:
        return None
    found = shipped_root() / path
    return found if os.path.exists(found) else None


def shipped(path: str | Path) -> Path:
    """The place of a file or folder that ships: the working folder's first, then the checkout's or the package's.

    Args:
        path: as the repository has it, `configs/demo/base`.

    Raises:
        ValueError: there is none of this name; near ones are named.
    """
    found = find_shipped(path)
    if found is None:
        raise ValueError(missing(str(path)))
    return found


def missing(path: str) -> str:
    """What to say of a file that is neither in the working folder nor shipped: its name, and the nearest ones."""
    near = difflib.get_close_matches(path, shipped_files(), n=3)
    meant = f"did you mean {' or '.join(near)}?" if near else "`longrl recipes list` lists those"
    return f"{path} is neither in the working folder ({Path.cwd()}) nor among the files of longrl; {meant}"


def recipe_name(path: str) -> str:
    """What `--config` takes for a file that ships: of `configs/eval/mlvu.yaml` it is `eval/mlvu`."""
    return path.removeprefix("configs/").removesuffix(".yaml")


def find_recipe(name: str, folder: str = "configs") -> str | None:
    """The recipe of a name, as the repository has it: `configs/NAME.yaml`; None where there is none.

    Args:
        name: below `configs` or `folder`, with `.yaml` or without.
        folder: of a command's own recipes, which come first.
    """
    files = (f"{parent}{name.removesuffix('.yaml')}.yaml" for parent in (f"{folder}/", "configs/", ""))
    return next((file for file in files if find_shipped(file) is not None), None)


def missing_recipe(name: str) -> str:
    """What to say of a config that is neither a file nor a recipe, with the nearest recipes."""
    names = [recipe_name(file) for file in shipped_files() if file.endswith(YAML)]
    near = difflib.get_close_matches(recipe_name(name), names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else "`longrl recipes list` lists the recipes"
    return f"{name} is neither a file (working folder: {Path.cwd()}) nor a recipe of longrl; {meant}"


def place_of(text: str, working_folder: Path | None = None) -> str:
    """A value as it is, or the place of the shipped file or folder that it names and the working folder does not have.

    `name_of` gives the name back, so that what is written down holds on another machine.
    """
    found = find_shipped(text, working_folder) if text.startswith(FOLDERS) and "/" in text else None
    return text if found is None or not found.is_absolute() else _remembered(found, text)


def place_of_part(text: str, working_folder: Path) -> str:
    """As `place_of`, of a YAML file that another one names: first it may lie beside that, in the current folder."""
    if not text.startswith(FOLDERS) or Path(text).exists():
        return text
    found = find_shipped(text, working_folder)
    return text if found is None else _remembered(working_folder / found, text)


def _remembered(place: Path, name: str) -> str:
    _names[str(place)] = name
    return str(place)


def name_of(text: str) -> str:
    """The value that `place_of` was given for what it returned; every other text as it is, behind `--option=` too."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{flag}{equals}{_names.get(value, value)}"
