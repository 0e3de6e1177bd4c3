"""The parts of a run for commands that do not train: parsed as `fit` parses them, with options of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from longrl.commands.main import COMMAND_USAGE
from longrl.commands.run_config import Config
from longrl.commands.run_parser import RunParser
from longrl.commands.trainer import LongRLCLI

FIT_ONLY = ("ckpt_path", "weights_only")
"""Keys in the config.yaml of a run that the command `fit` alone knows."""


class RunParts(LongRLCLI):
    """Model, data and rollouts of a run, built without a trainer: its devices need not be here.

    A command reads the whole config and checks it as `fit` does, and uses of it:

    - `serve`: the family, the precision that the trainer computes in, and the longest prompt and completion;
    - `cache-features`: the family, its weights and precision, the rows of data.train, val and test, how they are
      rendered, and `model.feature_cache_dir`;
    - `plan`: all but weights and videos; `replay`: the config of a run.

    Args:
        command: of `python -m longrl`.
        args: its options: those of `fit`, and the command's own.
        description: of the command.
        options_class: dataclass of the command's own options; `options` is an instance of it.
    """

    def __init__(
        self, command: str, args: Sequence[str], description: str = "", options_class: type[Any] | None = None
    ) -> None:
        self.options_class = options_class
        self.options: Any = None
        super().__init__(
            self.module_class,
            self.data_class,
            save_config_callback=None,
            parser_class=RunParser,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            run=False,
            args=list(args),
            parser_kwargs={
                "prog": f"{self.prog} {command}",
                "usage": COMMAND_USAGE.format(self.prog, command),
                "description": f"{description} All other options are those of `python -m longrl fit`.",
            },
        )

    @override
    def current_config(self, values: Config, path: Path) -> Config:
        return {name: value for name, value in super().current_config(values, path).items() if name not in FIT_ONLY}

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.options_class is not None:
            switches = {field.name: field for field in dataclasses.fields(self.options_class) if field.type == "bool"}
            parser.add_class_arguments(self.options_class, skip=set(switches))
            for name, field in switches.items():  # `--enforce_eager` alone switches it on
                yes_no = ActionYesNo(no_prefix=None)  # type: ignore[arg-type]
                parser.add_argument(f"--{name}", action=yes_no, default=field.default, help=field.metadata["help"])
        super().add_default_arguments_to_parser(parser)

    @override
    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
        if self.options_class is not None:
            fields = dataclasses.fields(self.options_class)
            self.options = self.options_class(**{field.name: self.config_init[field.name] for field in fields})
