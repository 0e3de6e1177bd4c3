"""The prompts folder: text files with `{names}` in them, each said to a model as it is."""

from __future__ import annotations

import re
from pathlib import Path

from longrl.io.shipped_files import find_shipped

NAME = re.compile(r"\{([a-z_]+)\}")


class Prompts:
    """The files of a folder.

    Args:
        folder: `prompts` of the config.
    """

    def __init__(self, folder: str) -> None:
        self.folder = (find_shipped(folder) or Path(folder)).expanduser()
        if not self.folder.is_dir():
            raise ValueError(
                f"--prompts={folder} is no folder (working folder: {Path.cwd()}); leave it out for those that ship, or "
                "edit a copy of them (longrl recipes copy longvideo-reason/prompts)"
            )

    def text(self, name: str, **values: str) -> str:
        """A file's text with its names filled in; braces around anything else stay.

        Raises:
            ValueError: no such file, or it names something that is not given.
        """
        path = self.folder / f"{name}.txt"
        if not path.is_file():
            raise ValueError(f"there is no prompt {path}; every category needs a file question_NAME.txt there")
        text = path.read_text(encoding="utf-8").strip()
        unknown = sorted(set(NAME.findall(text)) - values.keys())
        if unknown:
            raise ValueError(f"{path} names {', '.join(unknown)}; it may name {', '.join(values) or 'nothing'}")
        return NAME.sub(lambda match: values[match[1]], text)
