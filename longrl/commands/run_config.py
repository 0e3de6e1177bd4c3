"""Config files of runs: what every parser reads them with, and the config.yaml that a run has left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import get_loader, set_loader

from longrl.commands.renamed import MOVED, ROLLOUT_CLASS, current_names
from longrl.commands.shipped_paths import with_shipped_values
from longrl.io.plain_yaml import MAX_CONFIG_CHARACTERS, load_yaml
from longrl.io.text_files import read_utf8

ModelKind = Literal["language", "diffusion"]
FAMILIES: dict[ModelKind, str] = {"language": "longrl.models.", "diffusion": "longrl.diffusion."}
"""Packages of the model families."""
POLICIES: dict[str, ModelKind] = {"causal": "language", "flow": "diffusion"}
"""Values of the key `policy`, which once chose the kind."""
Config = dict[str, Any]
ConfigCheck = Callable[[Config, Path], Config]
"""Gets a config file's values and its path and gives the values to go on with; ValueError ends the command."""

_load_plain_yaml = get_loader("yaml")


def set_config_reader(check: ConfigCheck | None = None) -> None:
    """Has parsers that are used from now on read YAML with the current names of everything.

    Args:
        check: of config files; the values of single options and files that a config names are not its concern.
    """
    working_folder = Path.cwd()  # while a file is read, the current one is the file's

    def read(text: str, path: str = "") -> Any:
        if len(text) > MAX_CONFIG_CHARACTERS:
            raise ValueError(
                f"{path or 'a value'} has {len(text)} characters, and is no config: those have a few thousand"
            )
        try:
            values = with_shipped_values(current_names(load_yaml(text, _load_plain_yaml)), working_folder)
        except yaml.YAMLError as error:
            if not path:  # a value of the command line may be plain text
                raise
            said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
            raise ValueError(f"--config {path} is no YAML: {said}") from error
        if path and not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
            raise ValueError(f"--config {path} must hold options by name, as `data:`, got {str(values)[:100]!r}")
        return check(values, Path(path)) if check and path else values

    set_loader("yaml", read, (yaml.YAMLError,))


def training_config(values: Config, path: Path, kind: ModelKind) -> Config:
    """A config of a run that trains a model of one kind, in today's form.

    Raises:
        ValueError: it is of the other kind, or has the rollout callback among `trainer.callbacks`.
    """
    family = _family_path(values, path)
    named = next((kind for kind, package in FAMILIES.items() if family.startswith(package)), kind)
    found = POLICIES.get(str(values.pop("policy", "")), named)
    if found != kind:
        commands = "fit, validate and test" if found == "diffusion" else "fit, validate, test and predict"
        command = "python -m longrl diffusion" if found == "diffusion" else "python -m longrl"
        raise ValueError(f"--config {path} is of a {found} model, whose commands are {command} {commands}")
    return _current_form(values, path)


def evaluation_config(values: Config, path: Path) -> Config:
    """A config of `evaluate`.

    Raises:
        ValueError: it is of a training run.
    """
    for key in sorted({"trainer", "model"} & values.keys())[:1]:
        raise ValueError(
            f"--config {path} is of a training run (it has `{key}`), which `evaluate` does not read; name one of "
            "configs/eval/, and the run by --policy.init_args.weights RUN"
        )
    return values


def read_run_config(run: str) -> Config:
    """The config.yaml in the folder of a training run, in today's form.

    Raises:
        ValueError: there is none, or it is no config.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--run={run} has no config.yaml; name the folder of a training run (its --run_dir)")
    try:
        values = with_shipped_values(current_names(load_yaml(read_utf8(path))), Path.cwd())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options by name, got {str(values)[:100]!r}; name the folder of a run")
    values.pop("policy", None)
    return _current_form(values, path)


def callback_list(trainer: Any) -> list[Any]:
    """`trainer.callbacks` as a list, whether there are none, one or several."""
    listed = trainer.get("callbacks") or []
    return listed if isinstance(listed, list) else [listed]


def _family_path(values: Config, path: Path) -> str:
    """Import path of the class of `model.family`; empty where a config does not say it."""
    model = values.get("model")
    family = model.get("family") if isinstance(model, dict) else None
    if isinstance(family, str) and family.endswith((".yaml", ".yml")):  # a file, found from this one
        file = path.parent / family
        family = current_names(load_yaml(file.read_text())) if file.is_file() else None
    return str(family.get("class_path")) if isinstance(family, dict) else str(family)


def _current_form(values: Config, path: Path) -> Config:
    """Moves the rollout callback of a config that an earlier release saved with a run to the group `rollout`.

    A user's own file is left as it is, and refused: it is to be edited.
    """
    trainer = values.get("trainer") or {}
    callbacks = callback_list(trainer) if isinstance(trainer, dict) else []
    others = [item for item in callbacks if not is_rollout_callback(item)]
    if len(others) == len(callbacks):
        return values
    if path.name != "config.yaml" or "wandb_project" not in values:
        raise ValueError(MOVED)
    moved = [item for item in callbacks if is_rollout_callback(item)][-1]
    trainer["callbacks"] = others
    return values | {"rollout": moved["init_args"]}


def is_rollout_callback(item: Any) -> bool:
    """True of a class path, or a mapping with one, that names a rollout callback of longrl."""
    class_path = item.get("class_path") if hasattr(item, "get") else item
    return isinstance(class_path, str) and ROLLOUT_CLASS.fullmatch(class_path) is not None
