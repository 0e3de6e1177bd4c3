"""How a run shows questions to its model, family, frames, template and sampling: for whoever evaluates its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longrl.commands.renamed import current_names
from longrl.commands.run_config import Config, read_run_config
from longrl.commands.run_folders import EVALUATING, run_of
from longrl.commands.run_trust import check_run_config, is_trusted
from longrl.io.plain_yaml import load_yaml

logger = logging.getLogger(__name__)

EXPORT_RECORD = "longrl_settings.yaml"
"""File of an exported folder that says how its model was asked."""
SHOWN_BY_DATA = ("video", "question_template")
"""Options of the data module that decide what a model is shown of a question."""
OF_TRAINING = ("model", "random_init", "init_seed", "init_device", "lora", "gradient_checkpointing")
"""Options of a family that say where weights come from or how they are trained, not what is asked of them."""
FEWER_TOKENS = ("temporal_pool", "spatial_pool", "max_kept_tokens", "merge_window")
"""Options of a family by which a video has fewer tokens than whoever loads the exported weights would show."""
MAX_TOLD = 6


@dataclass(frozen=True)
class RunSettings:
    """How a run, or the export of one, shows questions to its model."""

    source: str
    """The folder that says so."""
    family: Config
    """`class_path` and `init_args`."""
    data: Config = field(default_factory=dict)
    """Those of `SHOWN_BY_DATA` that are known."""
    sampling: Config | None = None
    """Of `validate` and `test`; None where nothing was sampled."""
    environment: Config | None = None
    """`rollout.environment`, which answered turns; None where completions had one."""
    file: Path = Path()
    """What it was read from."""

    def differences(self, others: Mapping[str, Any]) -> list[str]:
        """Where other settings depart from these, in words; options that either leaves out are its defaults.

        Args:
            others: `family`, and those of `data` and `sampling` that there are.
        """
        mine = {"family": _plain_family(self.family), "data": self.data, "sampling": self.sampling or {}}
        theirs = dict(others)
        theirs["family"] = _plain_family(theirs["family"])
        return [text for name in mine if name in theirs for text in _departures(name, mine[name], theirs[name])]


def read_settings(weights: str | None) -> RunSettings | None:
    """The settings of the run, or of the exported folder, that `weights` are of; None where nobody recorded any."""
    run = run_of(weights)
    if run is not None and (run / "config.yaml").is_file():
        config = read_run_config(str(run))
        family = config.get("model", {}).get("family")
        return None if not isinstance(family, dict) else _of_config(run, config)
    record = Path(weights or "").expanduser() / EXPORT_RECORD
    if weights is None or not record.is_file():
        return None
    known = current_names(load_yaml(record.read_text(encoding="utf-8")))
    family = known["family"]
    # The folder has config, tokenizer and processor: it stands on its own.
    family = family | {"init_args": (family.get("init_args") or {}) | {"model": str(weights)}}
    environment = known.get("environment")
    return RunSettings(str(weights), family, known.get("data") or {}, known.get("sampling"), environment, record)


def check_settings(settings: RunSettings, trusted: bool) -> None:
    """Raises ValueError if settings of a run name what a stranger could run code by, unless the user trusts them."""
    values = {"model": {"family": settings.family}, "data": settings.data, "sampling": settings.sampling}
    values["rollout"] = {"environment": settings.environment}
    check_run_config(values, settings.file, trusted)


def write_record(folder: Path, run: str) -> None:
    """Writes the settings of a run beside its exported weights, so that these can be evaluated as the run was."""
    settings = read_settings(run)
    if settings is None:
        return
    record: Config = {"family": _plain_family(settings.family), "data": settings.data, "sampling": settings.sampling}
    if settings.environment is not None:
        record["environment"] = settings.environment
    options = settings.family.get("init_args") or {}
    pooled = ", ".join(f"{name}={options[name]}" for name in FEWER_TOKENS if options.get(name) is not None)
    if pooled:
        record["note"] = (
            f"trained with {pooled}: no file of these weights says so, and others than longrl show every feature of a "
            "video, so more tokens than the model was trained with (docs/token_budget.md)"
        )
        logger.warning("%s: %s", folder / EXPORT_RECORD, record["note"])
    (folder / EXPORT_RECORD).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")


def tell_differences(settings: RunSettings, others: Mapping[str, Any]) -> None:
    """Says in one line where an evaluation departs from how the run showed its questions."""
    departures = settings.differences(others)
    if departures:
        more = f" and {len(departures) - MAX_TOLD} more" if len(departures) > MAX_TOLD else ""
        told = "; ".join(departures[:MAX_TOLD])
        logger.warning("not asked as %s asked in training: %s%s", settings.source, told, more)


def options_of(args: Sequence[str], *names: str) -> list[str]:
    """The values of options in a command line, in its order: `--config=a --config b` gives a and b."""
    found = []
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name in names:
            found.append(value if equals else following)
    return found


def with_run_config(args: Sequence[str]) -> list[str]:
    """A command line of `validate`, `test` or `predict` that has no config, with that of the run it names.

    The run is that of `--ckpt_path` or `--model.init_from`, else the one in `--run_dir`; results go into it unless
    `--run_dir` says otherwise. What the run began with is not what is evaluated.

    Args:
        args: the command and its options.

    Raises:
        ValueError: the run's config names what a stranger could run code by, see `check_run_config`.
    """
    command, *options = args
    if command not in EVALUATING or options_of(options, "--config", "-c"):
        return list(args)
    named = options_of(options, "--ckpt_path") or options_of(options, "--model.init_from")
    runs = (run_of(weights) for weights in [*named[-1:], *options_of(options, "--run_dir")[-1:]])
    run = next((run for run in runs if run is not None and (run / "config.yaml").is_file()), None)
    if run is None:
        return list(args)
    check_run_config(read_run_config(str(run)), run / "config.yaml", is_trusted(options))
    start = ["--config", str(run / "config.yaml"), f"--run_dir={run}", "--ckpt_path=null", "--model.init_from=null"]
    return [command, *start, *options]


def _of_config(run: Path, config: Config) -> RunSettings:
    data = config.get("data") or {}
    rollout = config.get("rollout") or {}
    sampling = rollout.get("eval_sampling")
    if sampling is None and rollout.get("reward") is not None and rollout.get("sampling"):
        # What the rollout callback makes of it.
        sampling = rollout["sampling"] | {"num_generations": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    shown = {name: data[name] for name in SHOWN_BY_DATA if data.get(name) is not None}
    environment = rollout.get("environment") if rollout.get("reward") is not None else None
    return RunSettings(str(run), config["model"]["family"], shown, sampling, environment, run / "config.yaml")


def _plain_family(family: Mapping[str, Any]) -> Config:
    """A family without what belongs to the run's own machine and training."""
    options = family.get("init_args") or {}
    kept = {
        name: value for name, value in options.items() if name not in OF_TRAINING and not name.startswith("freeze_")
    }
    return {"class_path": family["class_path"], "init_args": kept}


def _departures(name: str, mine: Any, theirs: Any) -> Iterator[str]:
    """Dotted names of values that differ, with both; of mappings only what both have."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in mine:
            if key in theirs:
                yield from _departures(f"{name}.{key}", mine[key], theirs[key])
    elif mine != theirs:
        yield f"{name} is {_shown(theirs)} (the run: {_shown(mine)})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
