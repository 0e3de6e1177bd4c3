"""The result of `validate`, `test` and `predict`: accuracy with intervals, and every answer on file."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.evaluation.metric import CategoryAccuracy, numbers
from longrl.evaluation.records import sample_record
from longrl.evaluation.scores import Summary
from longrl.io.atomic import atomic_write
from longrl.io.jsonl import write_jsonl
from longrl.modules.trained import TrainedModule
from longrl.types import Batch


class EvaluationReport(Callback):
    """Collects the groups of validation, test and prediction batches.

    `test` writes `evaluation.json` (scores) and `predictions.jsonl` to the run's folder and prints a table; `predict`
    writes `predictions.jsonl` alone. Every completion has its line; a question with several scores their mean.
    Validation logs the same scores as `val/strict_accuracy`, `val/robust_accuracy` and so on. All of them are counted
    by `CategoryAccuracy`, as in `python -m longrl evaluate`.

    Args:
        breakdowns: fields of the rows' metadata by which `test` scores too, such as `duration` for VideoMME.
    """

    def __init__(self, breakdowns: list[str] | None = None) -> None:
        self.breakdowns = breakdowns or []
        self.metric = CategoryAccuracy()
        self.records: list[dict[str, Any]] = []
        """Of all ranks, once written."""
        self._questions: list[list[dict[str, Any]]] = []
        """The records of each question of this rank."""
        self.summary: Summary | None = None

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        self.metric = CategoryAccuracy(pl_module.parallel.dp)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for question in self._records(batch):
            self.metric.update(question)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self.metric.summary()
        if summary is not None:  # SFT without rollouts answers nothing
            pl_module.log_dict({f"val/{name}": value for name, value in numbers(summary).items()})

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._questions += self._records(batch)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._questions += self._records(batch)

    def _records(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """The records of the completions of each group."""
        questions = []
        for group in batch.groups or ():
            indices = range(len(group.completions))
            questions.append([sample_record(group, index=index, breakdowns=self.breakdowns) for index in indices])
        return questions

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        self._write_predictions(trainer, pl_module)
        self.metric = CategoryAccuracy(pl_module.parallel.dp)
        for question in self._questions:
            self.metric.update(question)
        self.summary = self.metric.summary()
        if self.summary is None:
            raise ValueError("`test` needs at least one answered question, got none; is there a RolloutCallback?")
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "evaluation.json"
            atomic_write(path, json.dumps(self.summary.to_dict(), indent=2))
            print_scores({Path(trainer.default_root_dir).name: self.summary.to_dict()["scores"]})

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_predictions(trainer, pl_module)

    def _write_predictions(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        by_rank = pl_module.parallel.dp.gather(self._questions)
        # Rank r of W had rows r, r + W, ...: the records in the order of the rows.
        self.records = []
        for questions in zip_longest(*by_rank):
            for question in questions:
                self.records += question or ()
        if trainer.is_global_zero:
            write_jsonl(Path(trainer.default_root_dir) / "predictions.jsonl", self.records)


def print_scores(runs: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table of runs against categories: accuracy and its 95% interval in percent, and the number of questions."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *runs, title="accuracy, 95% interval")
    for category in next(iter(runs.values())):
        cells = [
            f"{100 * s['accuracy']:.1f}  [{100 * s['low']:.1f}, {100 * s['high']:.1f}]  n={s['n']}"
            for s in (scores[category] for scores in runs.values())
        ]
        table.add_row(category, *cells)
    Console(width=40 + 32 * len(runs)).print(table)
