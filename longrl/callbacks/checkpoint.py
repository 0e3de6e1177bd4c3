"""Checkpoints from which a run that was killed at any moment goes on as if it never had been."""

from __future__ import annotations

import copy
import math
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer
from typing_extensions import override

from longrl.io.atomic import PARTIAL_SUFFIX
from longrl.io.checkpoint_files import check_files, explained_failure, is_trusted, load_state, save_file
from longrl.io.disk_space import GIB, tell_missing_space
from longrl.io.exit_codes import HUNG
from longrl.io.number_ranges import SECONDS, check_ranges
from longrl.io.stop_signals import StopRun, current_signals
from longrl.modules.trained import TrainedModule
from longrl.strategies.axis import world_axis

LESS_SPACE = "lower --checkpoint.save_top_k"


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, made exact for manual optimization.

    - A rollout may take several optimizer steps, or none: a batch that reaches or passes a multiple of
      `every_n_train_steps` is saved, and so is the last one of the run.
    - Validation, or the end of the epoch, that follows a batch comes before the save: a resumed run would leave it out.
    - Lightning writes a batch's metrics to the loggers after the save, so they are in the checkpoint too, and a resumed
      run logs them first.
    - At the end of an epoch everything is saved in `on_train_epoch_end`: from a checkpoint of `on_train_batch_end`
      Lightning 2.6 loses count of the epochs, and a second interruption changes the run.
    - A signal that asks the run to end (`longrl.io.stop_signals`) has the batch saved as any other one, and the run
      ends there, on all ranks: `StopRun`.

    Args:
        every_n_minutes: save also after the batch with which so many minutes have passed since the last save.
        stop_within_s: seconds after a signal in which the step must have ended and been saved; else the process ends
            where it is, and what is kept is the last checkpoint. None waits for the step, however long it takes.
        **options: those of Lightning's `ModelCheckpoint`.
    """

    _due = False
    _stops = False
    """A signal asked the run to end with this batch."""
    _steps_before = 0
    _size = 0
    """Bytes that a checkpoint takes, about."""
    _unlogged: dict[str, Any] | None = None
    """Step and metrics of the batch that is being saved."""

    def __init__(
        self,
        every_n_minutes: float | None = None,
        stop_within_s: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        limits = {"every_n_minutes": every_n_minutes, "stop_within_s": stop_within_s}
        for name, value in limits.items():
            if value is not None and not value > 0:
                raise ValueError(f"checkpoint.{name} must be above 0, got {value}; leave it out to do without")
        check_ranges(limits, "checkpoint.", stop_within_s=SECONDS)
        self._stop_within_s = stop_within_s
        self._interval_s = math.inf
        """Longest time between two saves."""
        if self._train_time_interval is not None:
            self._interval_s = self._train_time_interval.total_seconds()
        if every_n_minutes is not None:
            self._interval_s = min(self._interval_s, 60 * every_n_minutes)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_same_start(trainer.ckpt_path)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._log_batch_before(trainer)
        signals = current_signals()
        if signals is not None:
            # Lightning has just taken SIGTERM: its handler talks to other ranks wherever this one is.
            signals.defer(self._stop_within_s)
        self._size = estimated_bytes(pl_module, trainer.optimizers)
        if trainer.is_global_zero and self.dirpath is not None:
            self._tell_space_of_run(Path(self.dirpath))
        loop = trainer.fit_loop
        # Under max_steps Lightning 2.6 would end the saved epoch once more.
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False
            loop.epoch_loop.reset_restart_stage()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_batch_before(trainer)  # in a run that had ended, and has trained nothing now

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._steps_before = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.global_step
        every = self._every_n_train_steps
        # A batch may take several steps: it counts when it passes a multiple without standing on it.
        if every > 0 and steps // every > self._steps_before // every:
            self._due = True
        is_last = 0 < trainer.max_steps <= steps
        if is_last:
            self._due = True
        # Ranks have clocks of their own, and a signal may reach one of them alone.
        wish = world_axis().max(self._wish())
        self._due |= wish > 0
        self._stops = wish > 1 and not is_last
        if not self._due or trainer.is_last_batch:
            return
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        # Validation that follows the batch belongs to it: the save waits for its end.
        validates = not loop.epoch_loop.val_loop.skip  # it is skipped without rows
        if validates and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        self._unlogged = _unlogged_metrics(trainer)
        self._save(trainer)
        # A later save, after validation, must not log this batch once more.
        self._unlogged = None
        self._end_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and not trainer.is_last_batch:
            self._save(trainer)
            self._end_if_asked(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        every = self._every_n_epochs
        max_epochs = trainer.max_epochs or 0  # -1 is no limit
        is_last = trainer.should_stop or 0 < max_epochs <= epochs
        is_multiple = every > 0 and epochs % every == 0
        if self._due or is_last or is_multiple:
            self._save(trainer)
        if not is_last:
            self._end_if_asked(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"unlogged": self._unlogged}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._unlogged = state_dict["unlogged"]

    def _log_batch_before(self, trainer: Trainer) -> None:
        """Logs the batch of the checkpoint that the run goes on from. Shards are read behind `on_fit_start`."""
        unlogged = self._unlogged
        self._unlogged = None
        if unlogged is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(unlogged["metrics"], unlogged["step"])

    def _wish(self) -> int:
        """What this rank wants of a batch that has ended: 0 nothing, 1 a checkpoint, 2 one and the end of the run."""
        signals = current_signals()
        if signals is not None and signals.requested:
            return 2
        waited = time.monotonic() - (self._last_time_checked or 0.0)
        return int(waited >= self._interval_s)

    def save_and_end(self, trainer: Trainer, reason: str) -> None:
        """Saves a run that cannot go on, before a step, and ends it; every rank must call it.

        Raises:
            StopRun: in any case.
        """
        # Lightning counts the batch that was to begin already.
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready > 1:  # a checkpoint as behind the batch before
            loop.batch_progress.total.ready -= 1
            loop.batch_progress.current.ready -= 1
        else:  # in an epoch without any Lightning 2.6 would count a step for a validation that it leaves out
            loop._batches_that_stepped -= 1
        self._save(trainer)
        raise StopRun(trainer.global_step, HUNG, reason)

    def _end_if_asked(self, trainer: Trainer) -> None:
        """Raises StopRun on all ranks if a signal reached one of them."""
        if self._stops:
            raise StopRun(trainer.global_step)

    def _save(self, trainer: Trainer) -> None:
        self._due = False
        # Lightning's rule: none in a sanity check or a fast_dev_run, and none twice at one step.
        if self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.is_global_zero and self.dirpath is not None:
            folder = Path(self.dirpath)
            tell_missing_space(folder, self._size, "the next checkpoint", LESS_SPACE)
        module = trainer.lightning_module
        assert isinstance(module, TrainedModule)
        candidates = self._monitor_candidates(trainer)
        with module.phases("save"):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._last_time_checked = time.monotonic()

    def _tell_space_of_run(self, folder: Path) -> None:
        """Warns before the first step if the checkpoints that the run will keep do not fit."""
        kept = int(bool(self.save_last))
        kept += max(self.save_top_k, 1 if self.save_top_k else 0)
        # One more, for the old one stays until the new one is whole; those that are there are replaced.
        there = len(list(folder.glob("*.ckpt")))
        missing = max(kept + 1 - there, 1)
        size = f"{missing} checkpoints of {self._size / GIB:.1f} GiB, of which one is there only while it is replaced"
        tell_missing_space(folder, missing * self._size, size, LESS_SPACE)


def check_same_start(checkpoint: Any) -> None:
    """Raises ValueError, on all ranks, if some go on from a checkpoint that others do not see."""
    begins = checkpoint is None
    of_ranks = world_axis().gather((begins, socket.gethostname()))
    blind = sorted({host for begins, host in of_ranks if begins})
    if blind and not all(begins for begins, _ in of_ranks):
        raise ValueError(
            f"there is a checkpoint to go on from, which ranks on {', '.join(blind)} do not see; name a --run_dir on a "
            "disk that all nodes share"
        )


def estimated_bytes(module: LightningModule, optimizers: Sequence[Optimizer]) -> int:
    """Size of a checkpoint of all ranks: weights, and two moments of those that train, also before there are any."""
    total = 0
    for value in module.state_dict().values():
        total += value.numel() * value.element_size()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                total += 2 * parameter.numel() * parameter.element_size()
    return total


def _unlogged_metrics(trainer: Trainer) -> dict[str, Any] | None:
    """Metrics of the current batch that Lightning will log."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    logged = connector.metrics["log"]
    # Plain numbers: a checkpoint with tensors of a GPU would not load without one.
    values = {name: float(value) for name, value in logged.items()}
    values["epoch"] = trainer.current_epoch
    # Lightning's loggers count batches that stepped, not optimizer steps.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return {"step": step, "metrics": values}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames: whoever is killed while saving still has the one before.

    Lightning writes to the system's temporary folder, and moving from there is no rename where that is another disk.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # A bucket has no rename; its own upload is seen whole or not at all.
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        for left in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):  # by a process that was killed while saving
            left.unlink(missing_ok=True)
        with explained_failure(path):
            save_file(checkpoint, path)

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if "://" in str(path):  # of an address Lightning would unpickle anything
            return super().load_checkpoint(path, map_location, weights_only=not is_trusted())
        path = Path(path)
        if path.is_dir():
            raise ValueError(
                f"{path} is a checkpoint of several ranks, which one without them does not read; set trainer.strategy "
                "to longrl.strategies.mr_sp.MRSPStrategy, also on one device"
            )
        check_files(path)
        state = load_state(path)
        # What stays in use is copied: tensors in the file keep its place on the disk when a later one replaces it.
        return {name: value if name == "state_dict" else copy.deepcopy(value) for name, value in state.items()}
