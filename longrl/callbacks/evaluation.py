"""The result of `validate`, `test` and `predict`: accuracy with intervals, and every answer on file."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.loading.render import RowRenderer
from longrl.evaluation.answering import Answer, make_answer, make_portable
from longrl.evaluation.benchmark import BLIND, WITH_VIDEO
from longrl.evaluation.costs import ModelCost
from longrl.evaluation.graded_tables import TABLE_WIDTH, graded_tables
from longrl.evaluation.local_policy import class_path, shown_name
from longrl.evaluation.metric import CategoryAccuracy, logged_values
from longrl.evaluation.outcomes import SHUFFLED, Outcome, make_outcome
from longrl.evaluation.records import Record, group_records, video_name
from longrl.evaluation.result_files import (
    DESCRIPTION_FILE,
    check_extends,
    describe_evaluation,
    write_evaluation,
    write_json,
    write_samples,
)
from longrl.evaluation.samples import PREDICT_FOLDER as PREDICT_FOLDER, TEST_FOLDER
from longrl.evaluation.scores import Scores
from longrl.io.fingerprint import files_fingerprint
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.modules.initial_weights import find_checkpoint
from longrl.modules.policy import PolicyModule
from longrl.modules.trained import data_module_of
from longrl.types import Batch, Row, UnusableSample

logger = logging.getLogger(__name__)


class EvaluationReport(Callback):
    """Collects the groups of validation, test and prediction batches.

    `test` writes the files of `python -m longrl evaluate` to `run_dir/test` (results.json, samples.jsonl, report.html)
    and prints a table; `predict` writes samples.jsonl alone, to `run_dir/predict`. The run's own files stay untouched.
    A question with several completions scores their mean. Validation logs the same scores as `val/strict_accuracy`,
    `val/robust_accuracy` and so on.

    Args:
        breakdowns: fields of the rows' metadata by which `test` scores too, such as `duration` for VideoMME.
        num_cards: questions that the report shows with what was answered.
    """

    def __init__(self, breakdowns: list[str] | None = None, num_cards: int = 8) -> None:
        check_ranges(locals(), num_cards=NOT_NEGATIVE)
        self.breakdowns = breakdowns or []
        self.num_cards = num_cards
        self.metric = CategoryAccuracy()
        self.outcome: Outcome | None = None
        """Outcome of all ranks, at the end of `test` or `predict`."""
        self._questions: list[tuple[Answer, list[Record]]] = []
        """Questions of this rank; each answer with the records of its completions."""
        self._cost: ModelCost | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("test", "predict"):
            find_rollout_callback(trainer)

    # ---- validation ----

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self.metric = CategoryAccuracy(pl_module.parallel.dp)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        for group in batch.groups or ():
            records = group_records(group.prompt.row, group, self.breakdowns)
            self.metric.update(records)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self.metric.summary()
        if summary is None:  # SFT without rollouts answers nothing
            return
        values = logged_values(summary)
        pl_module.log_dict({f"val/{name}": value for name, value in values.items()})

    # ---- test and predict ----

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / TEST_FOLDER
        if check_extends(folder, self._describe(trainer, pl_module), "--run_dir"):
            logger.warning("%s has the results of this evaluation already; they are made again", folder)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / PREDICT_FOLDER
        if check_extends(folder, self._describe(trainer, pl_module), "--run_dir", DESCRIPTION_FILE):
            logger.warning("%s has these answers already; they are made again", folder)

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        if self._cost is None:
            self._cost = ModelCost.of(pl_module.family, pl_module.model)
        for group in batch.groups or ():
            answer = make_answer(pl_module.family, group.prompt, group.completions, self._cost)
            records = group_records(group.prompt.row, group, self.breakdowns)
            self._questions.append((answer, records))

    on_predict_batch_end = on_test_batch_end

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, description = self._gather(trainer, pl_module)
        outcome = self.outcome
        if outcome is None or outcome.summary is None:
            raise ValueError(
                "`test` needs at least one answered question, got none; look at trainer.limit_test_batches and at the "
                "list of skipped rows"
            )
        if trainer.is_global_zero:  # all ranks have the same outcome
            run_dir = Path(trainer.default_root_dir)
            write_evaluation(run_dir / TEST_FOLDER, description, rows, [outcome], num_cards=self.num_cards)
            scores = outcome.to_dict()["scores"]
            print_scores({run_dir.name: scores})
            for table in graded_tables(run_dir.name, outcome.summary):
                Console(width=TABLE_WIDTH).print(table)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, description = self._gather(trainer, pl_module)
        if trainer.is_global_zero and self.outcome is not None:
            # Not the run's own samples.jsonl, to which `Generations` appends.
            folder = Path(trainer.default_root_dir) / PREDICT_FOLDER
            write_samples(folder, description, rows, [self.outcome])
            write_json(folder / DESCRIPTION_FILE, description)

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Row], dict[str, Any]]:
        """Fills `outcome` with the questions of all ranks; all must call it.

        Returns:
            All rows, and what describes the evaluation.
        """
        assert isinstance(pl_module, PolicyModule)
        data = data_module_of(trainer)
        dp = pl_module.parallel.dp
        rows = list(data.datasets["test"].rows)

        # 1. The index of each answer's row: a record knows its id and answer, and an id may come twice.
        indices: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            indices[row.id, row.answer].append(index)
        answers: dict[int, Answer] = {}
        records: dict[int, list[Record]] = {}
        for answer, judged in dp.gather_list(self._questions):
            first = judged[0]
            key = (first["id"], first["answer"])
            index = indices[key].pop(0)
            answers[index] = answer
            # A prompt that is shown without its video does not say which one it was.
            video = {"video": video_name(rows[index])}
            records[index] = [record | video for record in judged]
        skipped: dict[int, UnusableSample] = {}
        skips = data.skips("test")
        for unusable in dp.gather(skips.drawn_unusable):
            skipped |= unusable

        # 2. Scores.
        blind = data.renderer.blind
        condition = condition_name(data.renderer)
        self.outcome = make_outcome(condition, rows, answers, records, skipped, breakdowns=self.breakdowns, blind=blind)
        return rows, self._describe(trainer, pl_module)

    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Who answers, and how: known before a question is asked."""
        assert isinstance(pl_module, PolicyModule)
        data = data_module_of(trainer)
        condition = condition_name(data.renderer)
        rollout = find_rollout_callback(trainer)
        family = pl_module.family
        # A checkpoint that the command names wins over what the run began with.
        weights = trainer.ckpt_path or pl_module.init_from or family.model_path
        policy = {
            "model": shown_name(str(weights)),
            "revision": None,
            "weights": weights_fingerprint(str(weights)),
            "family": class_path(family),
            "settings": make_portable(family.identity()),
            "engine": class_path(rollout.engine),
            "versions": rollout.engine.library_versions(),
        }
        if rollout.environment is not None:
            policy["environment"] = make_portable(rollout.environment.identity())
        name = Path(trainer.default_root_dir).name
        renderers = {condition: data.renderer}
        description = describe_evaluation(name, policy, rollout.eval_sampling, rollout.seed, data, renderers)
        for stage, limit in (("test", trainer.limit_test_batches), ("predict", trainer.limit_predict_batches)):
            # Of a part of the questions, not to be taken for all of them; 1 is one batch, 1.0 all of them.
            if isinstance(limit, int) or limit < 1.0:
                description["questions"][f"limit_{stage}_batches"] = limit
        return description


def condition_name(renderer: RowRenderer) -> str:
    """The name by which an evaluation knows how questions are shown."""
    if renderer.blind:
        return BLIND
    return f"{WITH_VIDEO}{SHUFFLED}" if renderer.shuffle_frames else WITH_VIDEO


def weights_fingerprint(source: str) -> str | None:
    """What tells the values of weights apart, of a file or folder; None of a hub id or an address.

    Args:
        source: a checkpoint, a run's folder, an exported folder, or a hub id.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    found = find_checkpoint(source) or path
    return files_fingerprint(found)


def find_rollout_callback(trainer: Trainer) -> RolloutCallback:
    """The callback that answers the questions of a run.

    Raises:
        ValueError: there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
        if isinstance(callback, RolloutCallback):
            return callback
    raise ValueError(
        "`test` and `predict` need rollout.reward to answer at all; name one by --rollout.reward FILE.yaml"
    )


def print_scores(runs: Mapping[str, Scores]) -> None:
    """A table of runs against categories: accuracy and its 95% interval in percent, and the number of questions."""
    table = Table("", *runs, title="accuracy, 95% interval")
    # All runs answered the same questions, so the first one has all categories.
    for category in next(iter(runs.values())):
        cells = []
        for scores in runs.values():
            score = scores[category]
            accuracy, low, high = (100 * score[name] for name in ("accuracy", "low", "high"))
            cells.append(f"{accuracy:.1f}  [{low:.1f}, {high:.1f}]  n={score['n']}")
        table.add_row(category, *cells)
    # Piped output has no width of its own: as wide as the columns need.
    width = 40 + 32 * len(runs)
    Console(width=width).print(table)
