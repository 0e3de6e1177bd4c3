"""The result of `validate`, `test` and `predict`: accuracy with intervals, and every answer on file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.answering import Answer, make_answer, portable
from longrl.evaluation.benchmark import BLIND, WITH_VIDEO
from longrl.evaluation.local_policy import class_path, shown_name
from longrl.evaluation.metric import CategoryAccuracy, logged_values
from longrl.evaluation.outcomes import Outcome, make_outcome
from longrl.evaluation.records import Record, group_records, video_name
from longrl.evaluation.result_files import describe_evaluation, write_evaluation, write_samples
from longrl.modules.policy import PolicyModule
from longrl.modules.trained import data_module_of
from longrl.types import Batch, Row, UnusableSample


class EvaluationReport(Callback):
    """Collects the groups of validation, test and prediction batches.

    `test` writes the files of `python -m longrl evaluate` to the run's folder (results.json, samples.jsonl,
    report.html) and prints a table; `predict` writes samples.jsonl alone. A question with several completions scores
    their mean. Validation logs the same scores as `val/strict_accuracy`, `val/robust_accuracy` and so on.

    Args:
        breakdowns: fields of the rows' metadata by which `test` scores too, such as `duration` for VideoMME.
        num_cards: questions that the report shows with what was answered.
    """

    def __init__(self, breakdowns: list[str] | None = None, num_cards: int = 8) -> None:
        self.breakdowns = breakdowns or []
        self.num_cards = num_cards
        self.metric = CategoryAccuracy()
        self.outcome: Outcome | None = None
        """Of all ranks, at the end of `test` or `predict`."""
        self._questions: list[tuple[Answer, list[Record]]] = []
        """Of this rank; each answer with the records of its completions."""

    # ---- validation ----

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
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
        for group in batch.groups or ():
            self.metric.update(group_records(group.prompt.row, group, self.breakdowns))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self.metric.summary()
        if summary is not None:  # SFT without rollouts answers nothing
            pl_module.log_dict({f"val/{name}": value for name, value in logged_values(summary).items()})

    # ---- test and predict ----

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
        assert isinstance(pl_module, PolicyModule)
        for group in batch.groups or ():
            answer = make_answer(pl_module.family, group.prompt, group.completions)
            records = group_records(group.prompt.row, group, self.breakdowns)
            self._questions.append((answer, records))

    on_predict_batch_end = on_test_batch_end

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, description = self._gather(trainer, pl_module)
        if self.outcome is None or self.outcome.summary is None:
            raise ValueError("`test` needs at least one answered question, got none; is there a RolloutCallback?")
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_evaluation(folder, description, rows, [self.outcome], num_cards=self.num_cards)
            print_scores({folder.name: self.outcome.to_dict()["scores"]})

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, description = self._gather(trainer, pl_module)
        if trainer.is_global_zero and self.outcome is not None:
            write_samples(Path(trainer.default_root_dir), description, rows, [self.outcome])

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Row], dict[str, Any]]:
        """Fills `outcome` with the questions of all ranks; all must call it.

        Returns:
            All rows, and what describes the evaluation.
        """
        assert isinstance(pl_module, PolicyModule)
        data = data_module_of(trainer)
        rows = list(data.datasets["test"].rows)
        indices: dict[tuple[str, str], list[int]] = {}  # an id may come twice
        for index, row in enumerate(rows):
            indices.setdefault((row.id, row.answer), []).append(index)

        answers: dict[int, Answer] = {}
        records: dict[int, list[Record]] = {}
        for answer, judged in pl_module.parallel.dp.gather_list(self._questions):
            index = indices[judged[0]["id"], judged[0]["answer"]].pop(0)
            answers[index] = answer
            # A prompt that is shown without its video does not say which one it was.
            records[index] = [{**record, "video": video_name(rows[index])} for record in judged]
        skipped: dict[int, UnusableSample] = {}
        for unusable in pl_module.parallel.dp.gather(data.skips("test").drawn_unusable):
            skipped |= unusable

        condition = BLIND if data.renderer.blind else WITH_VIDEO
        blind = data.renderer.blind
        self.outcome = make_outcome(condition, rows, answers, records, skipped, breakdowns=self.breakdowns, blind=blind)
        return rows, self._description(trainer, pl_module, data, condition)

    def _description(
        self, trainer: Trainer, policy: PolicyModule, data: LongVideoReason, condition: str
    ) -> dict[str, Any]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning does not declare
        rollout = next(callback for callback in callbacks if isinstance(callback, RolloutCallback))
        weights = trainer.ckpt_path or policy.init_from or policy.family.model_path
        identity = {
            "model": shown_name(str(weights)),
            "revision": None,
            "family": class_path(policy.family),
            "settings": portable(policy.family.identity()),
            "engine": class_path(rollout.engine),
            "versions": rollout.engine.library_versions(),
        }
        name = Path(trainer.default_root_dir).name
        renderers = {condition: data.renderer}
        return describe_evaluation(name, identity, rollout.eval_sampling, rollout.seed, data, renderers)


def print_scores(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
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
