"""One training step under torch's profiler: which operators take its time, and on a GPU who holds its memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.io.atomic import atomic_folder, set_aside

logger = logging.getLogger(__name__)

MEMORY_EVENTS = 1_000_000
"""Allocations of the step that are kept, the last ones."""
ROWS = 60
"""Of the table of operators."""


class StepProfile(Callback):
    """A folder `rank0`, `rank1` and so on for each rank, once the step is over; made by `fit --profile DIR`.

    | file | what |
    |---|---|
    | `trace.json.gz` | every operator and kernel, and the phases of the step, for https://ui.perfetto.dev |
    | `operators.txt` | the operators that take most time of their own |
    | `memory.pickle` | on a GPU: every allocation and who made it, for https://pytorch.org/memory_viz |

    It stands before other callbacks, so that the step's rollouts are in it.

    Args:
        folder: of all ranks.
        step: which of this process's steps, counted from 0; in the first ones memory is still being reserved and
            kernels are compiled.
    """

    def __init__(self, folder: str, step: int = 2) -> None:
        self.folder = Path(folder)
        self.step = step
        self._num_begun = 0
        self._profiler: torch.profiler.profile | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._num_begun == self.step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self._num_begun += 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        folder = self.folder / f"rank{trainer.global_rank}"
        if folder.exists():
            set_aside(folder)
        with atomic_folder(folder) as work:
            write_profile(self._profiler, work)
        self._end()
        logger.info("the profile of step %d is in %s", self.step, folder)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._num_begun <= self.step:
            logger.warning(
                "--profile=%s has nothing: the run ended after %d steps, and step %d, counted from 0, would have been "
                "profiled; raise trainer.max_steps", self.folder, self._num_begun, self.step
            )  # fmt: skip

    def _end(self) -> None:
        self._profiler = None
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)


def write_profile(profiler: torch.profiler.profile, folder: Path) -> None:
    """Writes what `StepProfile` says of a profiler that has stopped, and on a GPU the recorded allocations."""
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    has_gpu = torch.cuda.is_available()
    order = "self_device_time_total" if has_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
    (folder / "operators.txt").write_text(table, encoding="utf-8")
    if has_gpu:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
