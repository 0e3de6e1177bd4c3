"""Samples to look at: what was asked, what the policy answered, what it got for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from longrl.callbacks.shown_frames import save_shown_frames
from longrl.io.jsonl import drop_records
from longrl.turns import restored_turn, saved_turn, turns_text
from longrl.types import Batch, Group

FILE = "samples.jsonl"
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
        self, every_n_steps: int = 10, num_prompts: int = 2, num_completions: int = 2, print_table: bool = False
    ) -> None:
        counts = [every_n_steps, num_prompts, num_completions]
        if min(counts) < 1:
            raise ValueError(
                f"every_n_steps, num_prompts and num_completions of Generations must be at least 1, got {counts}"
            )
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_completions = num_completions
        self.print_table = print_table
        self._steps_before = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes out what a run that goes on will show again: samples of steps after its checkpoint."""
        done = trainer.global_step
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, FILE)
            drop_records(path, lambda sample: sample.get("step", 0) > done)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._steps_before = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # A batch may take several steps and pass a multiple without standing on it.
        every = self.every_n_steps
        is_due = step // every > self._steps_before // every
        # SFT has no groups; of many ranks the first one's are enough to look at.
        if not batch.groups or not trainer.is_global_zero or not is_due:
            return
        samples: list[dict[str, Any]] = []
        for group in batch.groups[: self.num_prompts]:
            samples += group_samples(group, step, self.num_completions)
        folder = Path(trainer.default_root_dir)
        # One write of all lines: whoever reads the file meanwhile sees no half sample.
        lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
        text = "\n".join([*lines, ""])
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(text)
        columns = [*COLUMNS, *(["turns"] if any("turns" in sample for sample in samples) else [])]
        cells = [[table_cell(sample, name) for name in columns] for sample in samples]
        save_shown_frames(folder, step, batch.groups[: self.num_prompts], self.num_completions)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns, cells)
        if self.print_table:
            # A completion takes many lines: rules between them show where one ends.
            table = Table(*columns, title="samples", show_lines=True)
            for row in cells:
                table.add_row(*map(str, row))
            Console().print(table)


def group_samples(group: Group, step: int, count: int) -> list[dict[str, Any]]:
    """One dict per completion, the parts of its reward included."""
    row = group.prompt.row
    samples = []
    # Rewards and their parts are [G], one value for each completion.
    for index, completion in enumerate(group.completions[:count]):
        # A part that does not apply to the row is NaN, which is no JSON.
        parts = {name: float(values[index]) for name, values in group.reward_parts.items() if not values[index].isnan()}
        sample = {
            "step": step,
            "id": group.prompt.id,
            "category": row.category,
            "problem": row.problem,
            "answer": row.answer,
            "completion": completion.text,
            "reward": float(group.rewards[index]),
            "parts": parts,
        }
        if completion.versions is not None:  # [[optimizer step, tokens drawn by its weights], ...]
            steps, counts = completion.versions.unique_consecutive(return_counts=True)
            sample["versions"] = torch.stack([steps, counts], 1).tolist()
        if completion.turns:
            sample["turns"] = [saved_turn(turn) for turn in completion.turns]
        samples.append(sample)
    return samples


def table_cell(sample: dict[str, Any], name: str) -> Any:
    """A value of a sample as tables show it."""
    if name == "turns":
        return turns_text([restored_turn(turn) for turn in sample.get("turns", ())])
    return sample[name]
