"""Samples to look at: what was asked, what the policy answered, what it got for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from longrl.types import Batch, Group

COLUMNS = ("step", "id", "category", "problem", "answer", "completion", "reward")


class Generations(Callback):
    """Appends a few completions to `samples.jsonl` every so many optimizer steps; prints them, and logs a W&B table.

    Args:
        every_n_steps: how often; a rollout of several steps that reaches or passes a multiple is shown.
        num_prompts: prompts shown each time.
        num_completions: completions of each.
        print_table: also print a table on the console.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        num_prompts: int = 2,
        num_completions: int = 2,
        print_table: bool = False,
    ) -> None:
        if min(every_n_steps, num_prompts, num_completions) < 1:
            raise ValueError(
                "every_n_steps, num_prompts and num_completions of Generations must be at least 1, "
                f"got {every_n_steps}, {num_prompts} and {num_completions}"
            )
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_completions = num_completions
        self.print_table = print_table
        self._steps_before = 0

    @override
    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._steps_before = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        # A rollout may take several optimizer steps and pass a multiple without reaching it.
        every = self.every_n_steps
        due = trainer.global_step // every > self._steps_before // every
        if not batch.groups or not trainer.is_global_zero or not due:
            return
        rows: list[dict[str, Any]] = []
        for group in batch.groups[: self.num_prompts]:
            rows += group_samples(group, trainer.global_step, self.num_completions)
        # Appended line by line: the file can be read while the run goes on.
        path = Path(trainer.default_root_dir) / "samples.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                cells = [[row[name] for name in COLUMNS] for row in rows]
                logger.log_table("samples", list(COLUMNS), cells)
        if self.print_table:
            _print(rows)


def group_samples(group: Group, step: int, count: int) -> list[dict[str, Any]]:
    """One dict per completion, the parts of its reward included."""
    assert group.rewards is not None
    row = group.prompt.row
    samples = []
    for index, completion in enumerate(group.completions[:count]):
        sample = {
            "step": step,
            "id": group.prompt.id,
            "category": row.category,
            "problem": row.problem,
            "answer": row.answer,
            "completion": completion.text,
            "reward": float(group.rewards[index]),
            "parts": {name: float(values[index]) for name, values in group.reward_parts.items()},
        }
        samples.append(sample)
    return samples


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, title="samples", show_lines=True)
    for row in rows:
        table.add_row(*(str(row[name]) for name in COLUMNS))
    Console().print(table)
