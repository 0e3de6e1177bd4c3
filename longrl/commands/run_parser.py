"""The parser of commands that take the config of a run. Lightning comes with it; the other commands do without."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from longrl.commands.parsers import ShortErrors, distrust_values

distrust_values()  # Lightning's import has just allowed addresses


class RunParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line."""
