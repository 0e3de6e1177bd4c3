"""Config files of runs: what every parser reads them with, and the config.yaml that a run has left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from longrl.commands.renamed import current_names

ROLLOUT_CALLBACKS = (
    "longrl.callbacks.rollout.RolloutCallback",
    "longrl.diffusion.rollout_callback.DiffusionRolloutCallback",
)
"""What the group `rollout` configures; once they were among `trainer.callbacks`."""

Config = dict[str, Any]
ConfigCheck = Callable[[Config, Path], Config]
"""Gets a config file's values and its path and gives the values to go on with; ValueError ends the command."""

_load_plain_yaml = get_loader("yaml")


def set_config_reader(check: ConfigCheck | None = None) -> None:
    """Has parsers that are used from now on read YAML with the current names of everything.

    Args:
        check: of config files; the values of single options and files that a config names are not its concern.
    """

    def read(text: str, path: str = "") -> Any:
        try:
            values = current_names(_load_plain_yaml(text))
        except yaml.YAMLError as error:
            if not path:  # a value of the command line may be plain text
                raise
            raise ValueError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
        return check(values, Path(path)) if check and path and isinstance(values, dict) else values

    set_loader("yaml", read, (yaml.YAMLError,))


def language_config(values: Config, path: Path) -> Config:
    """A config of a run that trains a language model, in today's form.

    Raises:
        ValueError: it is of a diffusion model.
    """
    if values.pop("policy", "causal") == "flow":
        raise ValueError(
            f"--config {path} is of a diffusion model (policy: flow), whose commands are python -m longrl diffusion "
            "fit, validate and test; leave the key `policy` out"
        )
    return _current_form(values, path)


def diffusion_config(values: Config, path: Path) -> Config:
    """A config of a run that trains a diffusion model, in today's form."""
    if values.get("policy") == "flow":
        values.pop("policy")
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
        ValueError: there is none.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"--run={run} has no config.yaml; name the folder of a training run (its --run_dir)")
    values = current_names(yaml.safe_load(path.read_text()))
    values.pop("policy", None)
    return _current_form(values, path)


def rollout_callbacks(trainer: Any) -> list[Any]:
    """The rollout callbacks among `trainer.callbacks`, where they no longer belong."""
    listed = trainer.get("callbacks") if hasattr(trainer, "get") else None
    listed = listed if isinstance(listed, list) else [listed]
    return [item for item in listed if hasattr(item, "get") and item.get("class_path") in ROLLOUT_CALLBACKS]


def _current_form(values: Config, path: Path) -> Config:
    """Moves the rollout callback of a config that an earlier release saved with a run to the group `rollout`.

    A user's own file is left as it is, and refused once it is parsed: it is to be edited.
    """
    saved = path.name == "config.yaml" and "wandb_project" in values
    if saved and (found := rollout_callbacks(values["trainer"])):
        callbacks = values["trainer"]["callbacks"]
        values["trainer"]["callbacks"] = [item for item in callbacks if item not in found]
        values["rollout"] = found[-1]["init_args"]
    return values
