"""Old names of what configs, run folders and command lines hold, understood for one release with a warning.

The tables are in renamed.yaml beside this file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

logger = logging.getLogger(__name__)

_TABLES = yaml.safe_load(files(__package__).joinpath("renamed.yaml").read_text())
PATHS: dict[str, str] = _TABLES["paths"]
"""Import paths of modules, classes and functions: old to new. A module's entry counts for all that it defines."""
OPTIONS: dict[str, str] = _TABLES["options"]
"""Keys of configs and components of flags: old to new."""

ROLLOUT_OPTIONS = frozenset(
    ("reward", "sampling", "eval_sampling", "engine", "max_resample_rounds", "seed", "max_mismatch",
     "max_mean_mismatch", "bypass_old_logp_below", "overlap", "samples_per_batch")
)  # fmt: skip
"""What flags once set by `--trainer.callbacks.init_args.X`, as options of the last callback."""


def current_names(value: Any) -> Any:
    """Replaces old import paths and option names in what a YAML text holds.

    Args:
        value: a mapping, list or scalar, with any of these inside.
    """
    if isinstance(value, dict):
        return {_current_option(key): current_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [current_names(item) for item in value]
    return _current_path(value) if isinstance(value, str) else value


def current_arguments(args: Sequence[str]) -> list[str]:
    """Replaces old import paths and option names in a command line.

    Raises:
        ValueError: a flag sets an option of the rollout callback by its position among `trainer.callbacks`.
    """
    current = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            name = ".".join(_current_option(part) for part in name.split("."))
            option = name.removeprefix("--trainer.callbacks.init_args.")
            if option != name and option.partition(".")[0] in ROLLOUT_OPTIONS:
                raise ValueError(
                    f"trainer.callbacks.init_args.{option} is now rollout.{option}; write --rollout.{option}"
                )
        else:
            name = _current_path(name)
        current.append(f"{name}{equals}{_current_path(value)}")
    return current


def _current_option(name: Any) -> Any:
    if name in OPTIONS:
        _warn_once(name, OPTIONS[name])
    return OPTIONS.get(name, name)


def _current_path(text: str) -> str:
    if not text.startswith("longrl."):
        return text
    module, _, name = text.rpartition(".")
    new = PATHS.get(text) or (f"{PATHS[module]}.{name}" if module in PATHS else text)
    if new != text:
        _warn_once(text, new)
    return new


@cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is now %s; the old name works for one release", old, new)
