"""Writes down when each step's phases were, and when the engine had something to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.evaluation.timeline import FILE, step_timeline, timeline_line
from longrl.io.atomic import atomic_file
from longrl.io.jsonl import drop_records
from longrl.modules.policy import PolicyModule
from longrl.types import Batch

MAX_LENGTHS = 1024
"""Completions of a step whose lengths are written."""
MAX_BYTES = 32 << 20
"""Of the file; then its older half is taken out."""


class Timeline(Callback):
    """Appends a line for each step of RL to `timeline.jsonl`: phases, requests and lengths of completions, of rank 0.

    `fit` adds one by itself, behind all that rolls out. `python -m longrl report` draws the file, and `plan --async`
    reads it.
    """

    def __init__(self) -> None:
        self._start = 0.0
        """Where the step began: at the end of the one before."""
        self._num_bytes = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes out what a run that goes on will do again: steps after its checkpoint."""
        done = trainer.global_step
        path = Path(trainer.default_root_dir, FILE)
        if trainer.is_global_zero and path.is_file():
            drop_records(path, lambda row: not isinstance(row.get("step"), int) or row["step"] > done)
            self._num_bytes = path.stat().st_size
        self._begin(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def _begin(self, module: LightningModule) -> None:
        """A step begins now: what was before belongs to none."""
        if isinstance(module, PolicyModule):
            module.phases.spans.take()
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        start = self._start
        now = time.perf_counter()
        self._start = now
        taken = pl_module.phases.spans.take()
        if batch.groups is None or not trainer.is_global_zero:
            return
        phases = with_data([(span.phase, span.start_s - start, span.stop_s - start) for span in taken.phases])
        requests = None
        if taken.requests is not None:
            requests = [(span.start_s - start, span.stop_s - start, float(span.requests)) for span in taken.requests]
        rollouts = [(span.start_s - start, span.stop_s - start) for span in taken.rollouts if span.requests]
        timeline = step_timeline(
            trainer.global_step,
            now - start,
            phases,
            requests,
            rollouts,
            ranks=pl_module.parallel.dp.size,
            lengths=group_lengths(batch),
            prompt_tokens=sum(len(group.prompt.input_ids) for group in batch.groups) / max(1, len(batch.groups)),
        )
        self._append(Path(trainer.default_root_dir, FILE), timeline_line(timeline).encode() + b"\n")

    def _append(self, path: Path, line: bytes) -> None:
        if self._num_bytes + len(line) > MAX_BYTES:
            drop_older_half(path)
            self._num_bytes = path.stat().st_size
        with path.open("ab") as file:
            file.write(line)
        self._num_bytes += len(line)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation uses the same phases; they belong to no step."""
        self._begin(pl_module)


def with_data(phases: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The phases and, as one more, the wait for the batch: it ends with the first phase but a checkpoint's."""
    saved = max((stop for name, _, stop in phases if name == "save"), default=0.0)
    first = min((start for name, start, _ in phases if name != "save"), default=0.0)
    return [*phases, ("data", saved, first)]


def group_lengths(batch: Batch) -> list[list[int]]:
    """Tokens sampled of each completion, by group, of as many whole groups as `MAX_LENGTHS` allows and one at least."""
    lengths: list[list[int]] = []
    count = 0
    for group in batch.groups or ():
        count += len(group.completions)
        if lengths and count > MAX_LENGTHS:
            break
        lengths.append([completion.num_sampled for completion in group.completions])
    return lengths


def drop_older_half(path: Path) -> None:
    """Takes the first half of a file's lines out."""
    lines = path.read_bytes().splitlines(keepends=True)
    with atomic_file(path) as file:
        file.writelines(lines[len(lines) // 2 :])
