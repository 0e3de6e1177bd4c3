"""Folders of runs: what `fit` would replace in them, and whose weights `validate`, `test` and `predict` evaluate."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch.plugins.environments import SLURMEnvironment

from longrl.io.checkpoint_files import META
from longrl.io.plain_yaml import load_yaml
from longrl.modules.initial_weights import SIGNAL_CHECKPOINT, saved_checkpoints

logger = logging.getLogger(__name__)

EVALUATING = ("validate", "test", "predict")
CHOSEN_BY_LIGHTNING = ("last", "best", "hpc")
"""Values of `--ckpt_path` that are no paths."""
DECIDES_RUN = ("seed_everything", "model", "data", "rollout")
"""Keys of a config by which two runs are the same one."""


def checkpoint_folder(run_dir: str) -> str:
    """Where a run keeps its checkpoints."""
    return str(Path(run_dir) / "checkpoints")


def check_checkpoints(
    command: str | None, run_dir: str, ckpt_path: str | None, config: str = "", resumes: bool = False
) -> None:
    """Raises ValueError, before anything is written, if `fit` would replace a run or `ckpt_path` is not there.

    Args:
        command: of `longrl`.
        run_dir: the run's folder.
        ckpt_path: checkpoint that the command names.
        config: as `fit` would write it to config.yaml; read only where `has_traces`.
        resumes: `fit` is to go on with the run, or to begin it.
    """
    folder = Path(run_dir)
    last = Path(checkpoint_folder(run_dir), "last.ckpt")
    saved = saved_checkpoints(folder)
    if command == "fit" and ckpt_path is None:
        _check_unused(folder, saved, config, resumes)
    if ckpt_path == "last" and command in EVALUATING and not (saved and _is_last(saved[0])):
        # Lightning would go on with the weights that the run began with.
        raise ValueError(f"--ckpt_path=last, but there is no {last}; name a checkpoint that is there by --ckpt_path")
    if ckpt_path is None or ckpt_path in CHOSEN_BY_LIGHTNING or ":" in ckpt_path:
        return
    path = Path(ckpt_path)
    if not path.exists() and not path.with_name(f".{path.name}.before").exists():
        raise ValueError(
            f"--ckpt_path={ckpt_path} does not exist (working folder: {Path.cwd()}); name a checkpoint such as "
            f"{saved[0] if saved else last}, or leave the option out"
        )
    if path.is_dir() and not (path / META).is_file():
        inside = saved_checkpoints(path)
        remedy = f"name one in it, such as {inside[0]}" if inside else "name an exported folder by --model.init_from"
        raise ValueError(f"--ckpt_path={ckpt_path} is a folder and no checkpoint; {remedy}")


def has_traces(run_dir: str) -> bool:
    """True if a folder may hold what a run leaves before its first checkpoint."""
    return any(Path(run_dir, name).exists() for name in ("config.yaml", "samples.jsonl", "logs"))


def _check_unused(folder: Path, saved: list[Path], config: str, resumes: bool) -> None:
    """Raises ValueError if `fit` would begin the run in `folder` anew; under SLURM Lightning may go on with it."""
    signal = signal_checkpoint(saved)
    if signal is not None and _is_newest(signal, saved):
        logger.warning("the run goes on from %s, which SLURM's signal left", signal)
        return
    if saved:
        raise ValueError(
            f"--run_dir={folder} holds a run already, which `fit` does not replace; --resume auto goes on from its "
            f"last good checkpoint. Else go on with it by --ckpt_path {saved[0]}, or name another --run_dir or delete "
            "that folder to start anew"
        )
    is_begun = (folder / "samples.jsonl").is_file() or any(map(_has_values, folder.glob("logs/version_*/metrics.csv")))
    is_same = _same_run(folder / "config.yaml", config)
    if is_begun and is_same:
        logger.warning(
            "the run in %s ended before its first checkpoint; it begins anew, over its metrics and samples", folder
        )
    elif is_begun:
        raise ValueError(
            f"--run_dir={folder} holds the metrics or samples of another run, which ended before its first checkpoint; "
            "they would mix with this one's. Name another --run_dir, or delete that folder to start anew"
        )
    elif (folder / "config.yaml").is_file() and not is_same and not resumes:
        raise ValueError(
            f"--run_dir={folder} has the config.yaml of another run, which ended before its first step. --resume auto "
            "begins this run there and keeps that file under another name; or name another --run_dir"
        )


def _same_run(path: Path, config: str) -> bool:
    """True if a config.yaml says of model, data and rollouts what `config` says."""
    before, now = ((load_yaml(text) or {}) for text in (path.read_text() if path.is_file() else "", config))
    return all(before.get(name) == now.get(name) for name in DECIDES_RUN)


def _has_values(metrics: Path) -> bool:
    """True of a metrics.csv that has more than its head."""
    with metrics.open(encoding="utf-8") as lines:
        return sum(1 for _, line in zip(range(2), lines, strict=False) if line.strip()) == 2


def signal_checkpoint(saved: list[Path]) -> Path | None:
    """The checkpoint of a signal that Lightning loads without being told to, under SLURM alone; None if there is none.

    Args:
        saved: `saved_checkpoints` of the run's folder.
    """
    if not SLURMEnvironment.detect():
        return None
    return next((path for path in saved if SIGNAL_CHECKPOINT.fullmatch(path.name)), None)


def _is_newest(path: Path, saved: list[Path]) -> bool:
    return all(path.stat().st_mtime >= other.stat().st_mtime for other in saved if other.exists())


def _is_last(path: Path) -> bool:
    return path.name == "last.ckpt"


def is_run(folder: Path) -> bool:
    """True if a training run is in a folder: its config, or a checkpoint."""
    return (folder / "config.yaml").is_file() or bool(saved_checkpoints(folder))


def run_of(weights: str | None) -> Path | None:
    """The folder of the run that a checkpoint, or the run's folder itself, is of; None for anything else."""
    if weights is None or weights in CHOSEN_BY_LIGHTNING:
        return None
    path = Path(weights).expanduser()
    inside = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = inside if path.suffix == ".ckpt" else path
    return folder if is_run(folder) else None


def check_tested_weights(
    command: str, run_dir: str, ckpt_path: str | None, init_from: str | None, base_weights: bool
) -> None:
    """Raises ValueError if results of other weights than a run's would be written into it, under its name.

    Args:
        command: `validate`, `test` or `predict`.
        run_dir: where results are written.
        ckpt_path: weights, as the command line names them.
        init_from: weights otherwise.
        base_weights: the family's own weights are meant.
    """
    # 1. Weights that nobody named, or that were named twice.
    folder = Path(run_dir)
    saved = saved_checkpoints(folder)
    named = ckpt_path or init_from
    if base_weights and named:
        raise ValueError(
            f"--base_weights=true evaluates the family's own weights, but {named} is named too (by --ckpt_path or "
            "--model.init_from); leave one out"
        )
    signal = signal_checkpoint(saved)
    if signal is not None and ckpt_path is None and not base_weights:
        logger.warning("%s is evaluated, which SLURM's signal left; name another one by --ckpt_path", signal)
        return
    if named is None and not base_weights:
        found = f"; {saved[0]} is there" if saved else ", which has no checkpoint"
        raise ValueError(
            f"`{command}` is not told which weights to evaluate: --run_dir={run_dir} says where results go{found}. "
            f"Name a checkpoint by --ckpt_path {saved[0] if saved else 'FILE'}; a run, an export or a hub id by "
            "--model.init_from; the family's own weights by --base_weights=true and a --run_dir of their own. "
            "Options in front of --config are replaced by its values: put them behind it"
        )

    # 2. Results of other weights in the folder of a run.
    if not is_run(folder):
        return
    if base_weights:
        raise ValueError(
            f"--base_weights=true evaluates the family's own weights, but --run_dir={run_dir} holds a run, under whose "
            "name the result would be; name another --run_dir"
        )
    own = named in CHOSEN_BY_LIGHTNING or Path(str(named)).expanduser().resolve().is_relative_to(folder.resolve())
    if not own:
        remedy = f"evaluate its own weights by --ckpt_path {saved[0]}, or " if saved else ""
        raise ValueError(
            f"`{command}` would write the results of {named} into --run_dir={run_dir}, which holds another run; "
            f"{remedy}name a --run_dir of their own"
        )
