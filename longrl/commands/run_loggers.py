"""Where a run's metrics go: metrics.csv, Weights & Biases and TensorBoard, all continued when the run goes on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from longrl.callbacks.csv_log import CSVLog
from longrl.io.atomic import atomic_write

WandbMode = Literal["off", "offline", "online"]
WANDB_ID = "wandb_id"
"""File in a run's folder: the id of its W&B run, by which a resumed run goes on with it."""


def make_loggers(
    run_dir: str,
    command: str | None,
    wandb: WandbMode = "off",
    project: str = "longrl",
    tensorboard: bool = False,
) -> list[Logger]:
    """The loggers of a command.

    Args:
        run_dir: the run's folder.
        command: `fit` goes on with what the folder has; what others log at step 0 lies beside it.
        wandb: the option of that name.
        project: of W&B.
        tensorboard: the option of that name.

    Raises:
        ValueError: TensorBoard is wanted, and not installed.
    """
    is_fit = command == "fit"
    name = "logs" if is_fit else f"{command}_logs"
    loggers: list[Logger] = [CSVLog(run_dir, name, continues=is_fit)]
    if wandb != "off":
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # With an id, the default `resume="allow"` continues the run if the server has it.
        run_id = wandb_id(folder) if is_fit else None
        loggers.append(
            WandbLogger(project=project, name=folder.name, save_dir=run_dir, offline=wandb == "offline", id=run_id)
        )
    if tensorboard:
        _need_tensorboard("--tensorboard=true")
        name = "tensorboard" if is_fit else f"tensorboard/{command}"
        loggers.append(ContinuedTensorBoard(run_dir, name=name, version="", default_hp_metric=False))
    return loggers


def with_csv(given: Logger | Sequence[Logger], run_dir: str, command: str | None) -> list[Logger]:
    """The loggers of a user's own config, and behind them metrics.csv, which `report` reads."""
    loggers = [given] if isinstance(given, Logger) else list(given)
    if any(isinstance(one, CSVLog | CSVLogger) for one in loggers):
        return loggers
    is_fit = command == "fit"
    return [*loggers, CSVLog(run_dir, "logs" if is_fit else f"{command}_logs", continues=is_fit)]


def check_tensorboard(given: Any) -> None:
    """Raises ValueError if `trainer.logger` of a config names TensorBoard, and it is not installed.

    Args:
        given: a class path, a mapping with one, a list of these; or whether to log at all.
    """
    for one in given if isinstance(given, list) else [given]:
        class_path = one.get("class_path") if hasattr(one, "get") else one
        if str(class_path).endswith("TensorBoardLogger"):
            _need_tensorboard("trainer.logger: TensorBoardLogger")


def _need_tensorboard(option: str) -> None:
    if not any(map(find_spec, ("tensorboard", "tensorboardX"))):
        raise ValueError(
            f"{option} needs the package tensorboard, which is not installed; run `pip install tensorboard` (the extra "
            "`tensorboard` of longrl), or leave it out: metrics.csv is always written"
        )


def wandb_id(folder: Path) -> str | None:
    """The id in a run's folder, made if there is none; None on ranks other than 0, which log nothing there."""
    if getattr(rank_zero_only, "rank", 0):
        return None
    path = folder / WANDB_ID
    if not path.is_file():
        atomic_write(path, secrets.token_hex(4))
    return path.read_text().strip()


class ContinuedTensorBoard(TensorBoardLogger):
    """Lightning's logger, made to say from which step on a resumed run repeats what an earlier file has."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._experiment is None and step:
            self._kwargs["purge_step"] = step  # of its SummaryWriter, which is made now
        super().log_metrics(metrics, step)
