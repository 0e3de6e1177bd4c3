"""Ends a run that stands still, on all its ranks, and says where it does. What is watched: docs/limits.md."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.callbacks.watch_thread import FAILED, Trouble, WatchLimits, WatchThread, say
from longrl.io.exit_codes import HUNG, STOPPED
from longrl.io.heartbeats import FOLDER, Heartbeats
from longrl.io.processes import kill_descendants, lost_worker_in
from longrl.io.pulse import PULSE
from longrl.io.stop_signals import is_asked_to_stop

FACTORS = {"start": 4.0, "generate": 2.0, "save": 2.0}
"""Phases that may take so many times as long as others: weights are loaded, answers are long, disks are slow."""
LIMIT_S = 1800.0
PHASES = (*FACTORS, "data", "encode", "sync", "decode", "reward", "teacher", "update", "validate", "step")


class Watchdog(Callback):
    """Sees that every phase gets something done, that loader workers live and that no rank is silent.

    Args:
        limit_s: seconds in which a phase must get something done: a row, a micro-batch, a token, or its end. Start and
            checkpoint-saving have several times as long, and so has generating. 0 switches the watchdog off. None is
            1800, or as long as the strategy lets ranks wait for each other if that is longer.
        limits_s: seconds for single phases instead: start, data, encode, sync, generate, decode, reward, update,
            validate, save, step (what lies between them); 0 is no limit.
        silent_s: a rank whose heartbeat stands still for so long is taken for stopped: the others end, and it is
            killed if it is on the same machine.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        limits_s: dict[str, float] | None = None,
        silent_s: float = 300.0,
    ) -> None:
        limits = dict(limits_s or {})
        unknown = limits.keys() - set(PHASES)
        if unknown:
            raise ValueError(
                f"watchdog.limits_s knows the phases {', '.join(PHASES)}, got {', '.join(sorted(unknown))}"
            )
        self._is_usual = limit_s is None
        if limit_s is None:
            limit_s = LIMIT_S
        values = {"limit_s": limit_s, "silent_s": silent_s, **limits}
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f"watchdog: {name} must be at least 0, which is no limit, got {value}")
        if not silent_s:
            raise ValueError("watchdog.silent_s must be above 0, got 0; watchdog.limit_s=0 switches it off")
        self.limit_s = limit_s
        self.limits_s = limits
        self.silent_s = silent_s
        self._thread: WatchThread | None = None
        self._outer = "step"
        """Phase to go on with after validation."""

    def limit_of(self, phase: str) -> float:
        """Seconds in which a phase must get something done."""
        usual = self.limit_s * FACTORS.get(phase, 1.0)
        return self.limits_s.get(phase, usual) or float("inf")

    # -- life ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts watching: the ranks know each other from here on."""
        if not self.limit_s:
            return
        timeout = getattr(trainer.strategy, "_timeout", None)
        if self._is_usual and trainer.world_size > 1 and timeout is not None:
            # A rank that waits is not ended before its collective would be.
            self.limit_s = max(LIMIT_S, timeout.total_seconds())
        PULSE.enter("start")
        run = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        run = trainer.strategy.broadcast(run)
        folder = trainer.default_root_dir
        rank = trainer.global_rank
        beats = Heartbeats(folder, run, rank, trainer.world_size)
        finite = [self.limit_s * max(FACTORS.values()), *self.limits_s.values()]
        limits = WatchLimits(self.limit_of, max(finite), self.silent_s)
        stacks = Path(folder, FOLDER, f"stacks_rank{rank}.txt")
        self._stop()
        self._thread = WatchThread(limits, beats, stacks)
        self._thread.start()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.stop()
        self._thread = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the others what failed here. A loader worker that died ends the run as one that hangs.

        Raises:
            SystemExit: it was a loader worker.
        """
        thread = self._thread
        if thread is None or not isinstance(exception, Exception):
            self._stop()
            return
        if is_asked_to_stop():  # the signal has reached a worker or an engine, too: the others end as this one does
            if trainer.world_size > 1:
                thread.beats.end_all(f"rank {trainer.global_rank} abandoned its step", STOPPED)
            self._stop()
            return
        lost = lost_worker_in(exception)
        what = lost or f"rank {trainer.global_rank} failed: {type(exception).__name__}: {exception}"
        if lost and trainer.world_size > 1:
            thread.end(Trouble(lost))
        if trainer.world_size > 1:
            thread.beats.end_all(what[:2000], FAILED)
        self._stop()
        if lost:
            say(f"{lost}; the run ends with status {HUNG}")
            kill_descendants()
            raise SystemExit(HUNG) from exception

    # -- phases that nobody else names ---------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        PULSE.beats += 1  # weights are there; the reference's and a checkpoint's may take as long

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        PULSE.enter("step")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outer = PULSE.phase
        PULSE.enter("validate")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        PULSE.enter(self._outer)

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_predict_start = on_validation_start
    on_predict_end = on_validation_end

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        PULSE.beats += 1

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end
