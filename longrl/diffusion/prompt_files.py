"""`PromptFiles`: prompts for generators of pictures and videos, as batches of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from longrl.datamodules.loading.batches import EvalLoader, TrainLoader
from longrl.datamodules.loading.data_module import Split, StreamedData, check_at_least
from longrl.datamodules.loading.loader import PromptStream, RenderedRows
from longrl.datamodules.loading.row_order import RowOrder
from longrl.datamodules.loading.skips import SkipLog
from longrl.datamodules.rows.question_rows import ROW_ARGUMENTS
from longrl.diffusion.prompt_rows import read_prompts
from longrl.io.functions import import_function
from longrl.types import Row

if TYPE_CHECKING:
    import torch

    from longrl.diffusion.trajectory_rows import TrajectoryGroup


@dataclass
class PromptBatch:
    """The prompts of a step. The rollout callback fills `groups`, several samples of each."""

    prompts: list[Row]
    groups: list[TrajectoryGroup] | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> PromptBatch:
        """Lightning's device transfer: text has no device, and latents are where they were sampled."""
        return self


class PromptFiles(StreamedData):
    """Batches of prompts from text files, JSONL records or a hub data set.

    Every epoch has an order of its own, which `seed` alone decides; the position in it is in the checkpoint, so a
    run goes on with the prompt it would have had next. Data-parallel ranks read different prompts, ranks of a
    sequence-parallel group the same.

    Args:
        train: source of the training prompts: a `.txt` file with one on each line, a `.jsonl` file with one record on
            each, or a hub id `owner/name:split`; or several of them, one after the other.
        val: source of the prompts for validation, during `fit` and in `validate`.
        test: source of the prompts for `test`.
        row_function: import path (or `file.py:function`) of the function that turns a record into a `Row`:
            `prompt_row`, `geneval_row` or `ocr_row` of longrl.diffusion.prompt_rows, or your own.
        prompts_per_batch: prompts of a training step on each data-parallel rank; rollouts sample each several times.
        eval_prompts_per_batch: prompts of a validation or test batch on each data-parallel rank.
        max_train_rows: read only so many prompts of `train`, the first ones.
        max_eval_rows: read only so many prompts of `val` and of `test`, the first ones.
        seed: decides the order of the training prompts.

    Example:
        `PromptFiles(train="configs/demo/prompts.txt", val="configs/demo/prompts.txt", prompts_per_batch=4)`
    """

    def __init__(
        self,
        train: str | list[str] | Path | None = None,
        val: str | list[str] | Path | None = None,
        test: str | list[str] | Path | None = None,
        row_function: str = "longrl.diffusion.prompt_rows.prompt_row",
        prompts_per_batch: int = 8,
        eval_prompts_per_batch: int = 8,
        max_train_rows: int | None = None,
        max_eval_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, prompts_per_batch=prompts_per_batch, eval_prompts_per_batch=eval_prompts_per_batch)
        check_at_least(1, max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
        self.sources = {"train": _listed(train), "val": _listed(val), "test": _listed(test)}
        self.max_rows: dict[Split, int | None] = {"train": max_train_rows, "val": max_eval_rows, "test": max_eval_rows}
        self.row_function = import_function(row_function, "data.row_function", ROW_ARGUMENTS)
        self.prompts_per_batch = prompts_per_batch
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.seed = seed
        self.rows: dict[Split, list[Row]] = {}
        """Splits that have been read so far."""

    # -- reading the sources -------------------------------------------------------------------------------------

    @override
    def read_split(self, split: Split) -> None:
        sources = self.sources[split]
        results: list[Row | ValueError] = []
        for source in sources:
            for result in read_prompts(source, self.row_function):
                if len(sources) > 1 and isinstance(result, Row):
                    # The noise of a sample follows from its prompt's id, so ids of several sources must differ.
                    result = replace(result, id=f"{Path(source).stem}/{result.id}")
                results.append(result)
        results = results[: self.max_rows[split]]
        errors = [result for result in results if isinstance(result, ValueError)]
        if errors:
            raise ValueError(
                f"{len(errors)} of {len(results)} prompts of data.{split} cannot be used; the first: {errors[0]}. "
                "Correct them, or choose the function of their schema with data.row_function"
            )
        rows = [result for result in results if isinstance(result, Row)]
        name, count = Counter(row.id for row in rows).most_common(1)[0]
        if count > 1:
            raise ValueError(f"prompts of data.{split} must have different ids, but {count} have {name!r}; rename them")
        self.rows[split] = rows

    # -- loaders -------------------------------------------------------------------------------------------------

    @override
    def start_stream(self) -> None:
        rank, world_size = self.data_parallel()
        order = RowOrder(len(self.rows["train"]), self.seed, rank, world_size)
        self.start(PromptStream(self._rendered("train"), order, self._no_skips("train")))

    def _rendered(self, split: Split) -> RenderedRows[Row]:
        """Rows as they are: a prompt for a generator needs no rendering, its text encoders belong to the policy."""
        return RenderedRows(self.rows[split], _same_row)

    def _no_skips(self, split: Split) -> SkipLog:
        """Where loaders list rows they skip; prompts that were read can all be used."""
        return SkipLog("skipped.jsonl", split=split, num_rows=len(self.rows[split]), max_share=0.0, writes=False)

    @override
    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.stream, self.prompts_per_batch, PromptBatch)

    @override
    def eval_loader(self, split: Split) -> EvalLoader:
        rank, world_size = self.data_parallel()
        return EvalLoader(
            self._rendered(split),
            self._no_skips(split),
            self.eval_prompts_per_batch,
            rank=rank,
            world_size=world_size,
            make_batch=PromptBatch,
        )


def _same_row(row: Row) -> Row:
    return row


def _listed(source: str | list[str] | Path | None) -> list[str]:
    return [str(source)] if isinstance(source, str | Path) else list(source or [])
