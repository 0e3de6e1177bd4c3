"""The parser of commands that take the config of a run. Lightning comes with it; the other commands do without."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from longrl.commands.parsers import ShortErrors, distrust_values
from longrl.commands.shipped_paths import names_stay, with_names

distrust_values()  # Lightning's import has just allowed addresses


class RunParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line."""

    @override
    def dump(self, cfg: Any, *more: Any, **options: Any) -> str:
        """A config as YAML, that holds in any working folder: what ships is called by its name."""
        with names_stay():
            return super().dump(with_names(cfg), *more, **options)
