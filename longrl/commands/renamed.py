"""Old names of what configs, run folders and command lines hold, understood for one release with a warning.

The tables are in renamed.yaml beside this file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

logger = logging.getLogger(__name__)

_TABLES = yaml.safe_load(files(__package__).joinpath("renamed.yaml").read_text())
PATHS: dict[str, str] = _TABLES["paths"]
"""Import paths of modules, classes and functions: old to new. A module's entry counts for all that it defines."""
OPTIONS: dict[str, dict[str, str]] = _TABLES["options"]
"""Group of a config -> its options, old to new. A user's own class may have an option of an old name."""
VALUES: dict[str, dict[str, dict[Any, Any]]] = _TABLES["values"]
"""Group of a config -> options of an old name -> their values, old to new."""

ROLLOUT_CLASS = re.compile(r"(?<![\w.])(longrl\.([a-z]\w*\.)*)?(Flow|Diffusion)?RolloutCallback\b")
"""Every spelling of the classes that the group `rollout` configures; once they were among `trainer.callbacks`."""
ROLLOUT_OPTIONS = frozenset(
    ("reward", "sampling", "eval_sampling", "engine", "max_resample_rounds", "seed", "max_mismatch",
     "max_mean_mismatch", "bypass_old_logp_below", "max_staleness", "samples_per_batch")
)  # fmt: skip
"""Options that flags once set by `--trainer.callbacks.init_args.X`, those of the last callback."""
MOVED = (
    "the rollout callback has a group of its own: trainer.callbacks.init_args.X is now rollout.X; move its init_args "
    "from trainer.callbacks to `rollout`"
)
CALLBACK_FLAGS = ("--trainer.callbacks", "--trainer.callbacks+", "--trainer.callbacks.class_path")


def current_names(value: Any, group: str = "") -> Any:
    """Replaces old import paths and option names in what a YAML text holds.

    Args:
        value: a mapping, list or scalar, with any of these inside.
        group: that a mapping configures; options of others keep their names.
    """
    if isinstance(value, list):
        return [current_names(item) for item in value]
    if not isinstance(value, dict):
        return _current_path(value) if isinstance(value, str) else value
    class_path = str(value.get("class_path"))
    if ROLLOUT_CLASS.fullmatch(class_path):
        group = "rollout"
    elif class_path.startswith("longrl.models."):
        group = "family"
    return {
        _current_option(name, group): current_names(
            _current_value(name, group, item), group if name == "init_args" else name
        )
        for name, item in value.items()
    }


def current_arguments(args: Sequence[str]) -> list[str]:
    """Replaces old import paths and option names in a command line.

    Raises:
        ValueError: a flag is gone: the rollout callback among `trainer.callbacks`, an option of it by its position
            there, or `--policy` as the choice between kinds of models.
    """
    current: list[str] = []
    names: list[str] = []
    for before, arg, following in zip(["", *args], args, [*args, ""][1:], strict=False):
        name, equals, value = _current_flag_value(before, arg).partition("=")
        if name.startswith("--"):
            value = _current_flag_value(name, value)
            name = _current_flag(name)
            _refuse_flag(name, value if equals else following, names)
            names.append(name)
        else:
            name = _current_path(name)
        current.append(f"{name}{equals}{_current_path(value)}")
    return current


def _current_flag(name: str) -> str:
    """A flag's name with the current name of its option."""
    groups, dot, option = name.rpartition(".")
    return groups + dot + _current_option(option, _group_of_flag(groups))


def _group_of_flag(groups: str) -> str:
    return groups.removeprefix("--").removesuffix(".init_args").rpartition(".")[2]


def _current_flag_value(name: str, value: str) -> str:
    """The value behind a flag, as its option has it now."""
    groups, _, option = name.rpartition(".")
    values = VALUES.get(_group_of_flag(groups), {}).get(option, {})
    return next((str(new) for old, new in values.items() if str(old).lower() == value.lower()), value)


def _refuse_flag(name: str, value: str, before: Sequence[str]) -> None:
    """Raises ValueError for what the flags of earlier releases said otherwise.

    Args:
        name: of the flag.
        value: given with it.
        before: flags that stand before it; a callback that one of them names may have options of any name.
    """
    if name in CALLBACK_FLAGS and ROLLOUT_CLASS.search(value):
        raise ValueError(MOVED)
    if name == "--policy" and value in ("flow", "causal"):
        raise ValueError(f"--policy={value} is gone; leave it out, and train diffusion models by longrl diffusion fit")
    if not name.startswith("--trainer.callbacks.") or set(CALLBACK_FLAGS) & set(before):
        return
    first, dot, rest = name.removeprefix("--trainer.callbacks.").removeprefix("init_args.").partition(".")
    first = OPTIONS["rollout"].get(first, first)
    if first in ROLLOUT_OPTIONS:
        option = first + dot + rest
        raise ValueError(f"trainer.callbacks.init_args.{option} is now rollout.{option}; write --rollout.{option}")


def _current_value(name: Any, group: str, value: Any) -> Any:
    values = VALUES.get(group, {}).get(name, {})
    return values.get(value, value) if isinstance(value, str | bool | int) else value


def _current_option(name: Any, group: str) -> Any:
    new = OPTIONS.get(group, {}).get(name, name)
    if new != name:
        _warn_once(name, new)
    return new


def _current_path(text: str) -> str:
    new, before = text, ""
    while new != before and new.startswith("longrl."):  # a module may have moved, and what is in it have a new name
        before = new
        module, _, name = new.rpartition(".")
        new = PATHS.get(new) or (f"{PATHS[module]}.{name}" if module in PATHS else new)
    if new != text:
        _warn_once(text, new)
    return new


@cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is now %s; the old name works for one release", old, new)
