"""The config.yaml of a training run: written once, and never replaced."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from longrl.io.atomic import atomic_write, set_aside
from longrl.io.plain_yaml import load_yaml
from longrl.modules.initial_weights import saved_checkpoints

logger = logging.getLogger(__name__)

OF_THE_START = ("ckpt_path", "resume", "profile")
"""Keys that say where a command begins and how it is watched, and not what it does."""


class SaveRunConfig(SaveConfigCallback):
    """Writes the composed config of a training run to `run_dir/config.yaml`.

    One that is there stays. A run that goes on with another config leaves that as config.resumed1.yaml and so on; one
    that begins where another never came to its first checkpoint keeps that one's as config.yaml.old1.
    """

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            config = self.config.clone()
            # Another command with this file as its config says itself whether it resumes, or is profiled.
            config["resume"] = None
            config["profile"] = None
            text = self.parser.dump(config, skip_none=False)
            write_config(Path(trainer.default_root_dir), text)


def write_config(folder: Path, text: str) -> None:
    """Writes the config of a run that begins or goes on in `folder`."""
    path = folder / "config.yaml"
    if path.is_file() and _same_config(path, text):
        return
    if path.is_file() and saved_checkpoints(folder):
        path = _next_resumed(folder, text)
        if not path.is_file():
            logger.info("the config differs from %s, which stays; this one is %s", folder / "config.yaml", path)
            atomic_write(path, text)
        return
    if path.is_file():
        logger.warning("%s of a run without a checkpoint is %s now", path, set_aside(path))
    atomic_write(path, text)


def _next_resumed(folder: Path, text: str) -> Path:
    """The first free name, or the last one written if it holds the same."""
    last = None
    for number in itertools.count(1):
        path = folder / f"config.resumed{number}.yaml"
        if not path.is_file():
            return last if last is not None and _same_config(last, text) else path
        last = path
    raise AssertionError


def _same_config(path: Path, text: str) -> bool:
    return _content(path.read_text(encoding="utf-8")) == _content(text)


def _content(text: str) -> Any:
    values = load_yaml(text)
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if name not in OF_THE_START}
