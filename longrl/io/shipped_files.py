"""Files that ship with longrl: recipes and parts in `configs/`, scripts in `launch/`, prompts in `longvideo-reason/`.

In a checkout they lie beside the package, in an installed wheel in `longrl/shipped/`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDERS = ("configs", "launch", "longvideo-reason")
"""What ships, by its name in the repository."""
PACKAGE = Path(__file__).resolve().parents[1]


def shipped_root() -> Path:
    """The folder with `FOLDERS`: the checkout that longrl is imported from, or the one in an installed package."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else PACKAGE / "shipped"


def find_shipped(path: str | Path) -> Path | None:
    """A file or folder in the working folder, or of this name among the shipped ones; None where neither has it.

    Args:
        path: as the repository has it, `configs/trainer/cpu.yaml`. One that exists in the working folder is returned
            as it was given.
    """
    path = Path(path)
    if path.expanduser().exists():
        return path
    if path.is_absolute() or ".." in path.parts or path.parts[:1] not in {(name,) for name in FOLDERS}:
        return None
    found = shipped_root() / path
    return found if found.exists() else None


def shipped(path: str | Path) -> Path:
    """The place of a file or folder that ships: the working folder's first, then the checkout's or the package's.

    Args:
        path: as the repository has it, `configs/demo/base`.

    Raises:
        ValueError: there is none of this name; near ones are named.
    """
    found = find_shipped(path)
    if found is not None:
        return found
    known = [
        file.relative_to(shipped_root()).as_posix() for name in FOLDERS for file in shipped_root().glob(f"{name}/**/*")
    ]
    near = difflib.get_close_matches(Path(path).as_posix(), known, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else f"; longrl ships files in {', '.join(FOLDERS)}"
    raise ValueError(f"{path} is neither in the working folder ({Path.cwd()}) nor among the files of longrl{meant}")
