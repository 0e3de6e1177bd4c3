"""`LongVideoReason`: questions about long videos (arXiv:2507.07966) as batches of prompts, for SFT and for RL."""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from longrl.datamodules.loader import (
    EvalLoader,
    LoaderOptions,
    PromptStream,
    RenderedRows,
    RowOrder,
    Skipped,
    SkipLog,
    TrainLoader,
    UnusableRow,
)
from longrl.datamodules.rows import load_row_function, make_rows, media_root_of, read_records
from longrl.datamodules.video import BrokenMedia, VideoSampling, read_image, read_video
from longrl.models.base import MEDIA_TAG, ModelFamily
from longrl.types import Frames, MediaKind, Prompt, Row

logger = logging.getLogger(__name__)

Stage = Literal["sft", "rl"]
Split = Literal["train", "val", "test"]
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
"""Which sources a Lightning stage reads; the first is needed."""
DEFAULT_ROW_FUNCTION = "longrl.datamodules.rows.longvideo_reason_row"
DEFAULT_SAMPLING = VideoSampling()
DEFAULT_QUESTION = (
    "{problem}\n\nReason first, between <think> and </think>. Then give your final answer between <answer> and "
    "</answer>: for a question with options its letter alone, else the answer and nothing more."
)
DEFAULT_RESPONSE = "<think>{reasoning}</think><answer>{answer}</answer>"


@dataclass
class RowRenderer:
    """Row -> prompt, in a loader worker: decodes the media, fills the templates and asks the family for token ids."""

    family: ModelFamily
    video: VideoSampling
    stage: Stage = "rl"
    question_template: str = DEFAULT_QUESTION
    response_template: str = DEFAULT_RESPONSE
    answer_template: str = "{answer}"
    blind: bool = False
    max_prompt_tokens: int | None = None
    cached_media: int = 0
    _cache: OrderedDict[str, Frames] = field(default_factory=OrderedDict, repr=False)
    """path -> frames, the least recently used first."""

    def __call__(self, row: Row) -> Prompt:
        """The prompt of a row, with its SFT target if the stage is `sft`.

        Raises:
            UnusableRow: a medium is missing or broken, or the prompt is too long.
        """
        row = without_media(row) if self.blind else row
        frames = [self._frames(kind, path) for kind, path in ordered_media(row)]
        text = fill(self.question_template, problem=row.problem)
        prompt = self.family.render(row, text, frames, self.response(row))
        self._check_length(len(prompt.input_ids))
        return prompt

    def response(self, row: Row) -> str | None:
        """The SFT target of a row: reasoning and answer, or the answer alone where there is no reasoning."""
        if self.stage == "rl":
            return None
        template = self.response_template if row.reasoning else self.answer_template
        return fill(template, reasoning=row.reasoning or "", answer=row.answer)

    def _check_length(self, num_tokens: int) -> None:
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            raise UnusableRow(
                f"its prompt has {num_tokens} tokens, more than data.max_prompt_tokens={self.max_prompt_tokens}; raise "
                "that, or take fewer frames or smaller ones"
            )

    def _frames(self, kind: MediaKind, path: str) -> Frames:
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        try:
            frames = read_image(path) if kind == "image" else read_video(path, self.video)
        except BrokenMedia as error:
            raise UnusableRow(str(error), path) from error
        self._cache[path] = frames
        while len(self._cache) > self.cached_media:
            self._cache.popitem(last=False)
        return frames


def fill(template: str, **values: str) -> str:
    r"""The template with each `{name}` replaced; other braces stay, as in `\boxed{}`."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def without_media(row: Row) -> Row:
    """The row as a blind model is asked it."""
    return replace(row, videos=(), images=(), problem=MEDIA_TAG.sub("", row.problem).strip())


def ordered_media(row: Row) -> list[tuple[MediaKind, str]]:
    """Kind and path of each medium, in the order of the problem's `<image>` and `<video>` tags; else images first."""
    images, videos = ([(kind, path) for path in paths] for kind, paths in _media_paths(row))
    tags = MEDIA_TAG.findall(row.problem)
    if sorted(tags) != [kind for kind, _ in (*images, *videos)]:
        return [*images, *videos]  # no tags, or tags that the family will refuse
    left = {"image": iter(images), "video": iter(videos)}
    return [next(left[tag]) for tag in tags]


def _media_paths(row: Row) -> tuple[tuple[MediaKind, tuple[str, ...]], ...]:
    return ("image", row.images), ("video", row.videos)


class LongVideoReason(LightningDataModule):
    """Batches of prompts from records with videos, images or text alone.

    Args:
        family: how the model reads prompts; the command line links it to `model.family`.
        train: source of the training rows: a `.json`, `.jsonl` or `.parquet` file or a hub id `owner/name:split`, or
            several of them, one after the other.
        val: source of the rows for validation, during `fit` and in `validate`.
        test: source of the rows for `test` and `predict`.
        media_root: folder where relative media paths start; by default beside the source, if that is a file.
        row_function: import path (or `file.py:function`) of the function that turns a record into a `Row`.
        stage: `sft` gives prompts their target, from reasoning and answer; `rl` leaves it to be sampled.
        question_template: what the model is asked; `{problem}` is the question with its options.
        response_template: SFT target of a row with reasoning.
        answer_template: SFT target of a row without.
        video: which frames of a video are read, and how large.
        blind: leave all media out, to see what the text alone gives away.
        prompts_per_batch: prompts of a training step on each data-parallel rank.
        eval_prompts_per_batch: prompts of a validation or test batch on each data-parallel rank.
        max_prompt_tokens: longer prompts are skipped and listed; None for no limit.
        max_train_rows: read only the first so many rows of `train`.
        max_eval_rows: read only the first so many rows of `val` and of `test`.
        seed: order of the training rows.
        num_workers: processes that decode and render, for each loader; 0 does it in the trainer's own.
        prefetch_prompts: training prompts rendered ahead, over all workers; by default one batch.
        multiprocessing_context: how workers start: `fork`, `spawn` or `forkserver`; None for the platform's default.
        cached_media: decoded videos and images that each worker keeps, for sources that ask often about the same ones.
        bad_records: what a record that lacks a field or has an answer outside its options does: `error` before any
            weights are loaded, or `skip`, listed and counted like a broken video.
        check_files: look in `setup` whether all media exist.
        skipped_dir: folder of `skipped.jsonl`, the list of rows that were skipped; by default `trainer.default_root_dir`.
        max_skipped_share: share of a source's rows that may be skipped; see `longrl.datamodules.loader.SkipLog`.

    Example:
        `LongVideoReason(family, train="data/synthetic/train.jsonl", val="data/synthetic/eval.jsonl", stage="sft")`
    """

    def __init__(
        self,
        family: ModelFamily,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        media_root: str | None = None,
        row_function: str = DEFAULT_ROW_FUNCTION,
        stage: Stage = "rl",
        question_template: str = DEFAULT_QUESTION,
        response_template: str = "<think>{reasoning}</think><answer>{answer}</answer>",
        answer_template: str = "{answer}",
        video: VideoSampling = DEFAULT_SAMPLING,
        blind: bool = False,
        prompts_per_batch: int = 8,
        eval_prompts_per_batch: int = 8,
        max_prompt_tokens: int | None = None,
        max_train_rows: int | None = None,
        max_eval_rows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        prefetch_prompts: int | None = None,
        multiprocessing_context: str | None = None,
        cached_media: int = 0,
        bad_records: Literal["error", "skip"] = "error",
        check_files: bool = True,
        skipped_dir: str | None = None,
        max_skipped_share: float = 0.05,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "val": val, "test": test}
        self.media_root = media_root
        self.row_function = load_row_function(row_function)
        self.prompts_per_batch = prompts_per_batch
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.max_rows = {"train": max_train_rows, "val": max_eval_rows, "test": max_eval_rows}
        self.seed = seed
        self.num_workers = num_workers
        self.prefetch_prompts = prompts_per_batch if prefetch_prompts is None else prefetch_prompts
        self.multiprocessing_context = multiprocessing_context
        self.bad_records = bad_records
        self.check_files = check_files
        self.skipped_dir = skipped_dir
        self.max_skipped_share = max_skipped_share
        self.renderer = RowRenderer(
            family=family,
            video=video,
            stage=stage,
            question_template=question_template,
            response_template=response_template,
            answer_template=answer_template,
            blind=blind,
            max_prompt_tokens=max_prompt_tokens,
            cached_media=cached_media,
        )
        self._check_options()
        self.rows: dict[str, list[Row]] = {}
        """Rows of each split that is set up."""
        self._skips: dict[str, SkipLog] = {}
        self._stream: PromptStream | None = None
        self._state: dict[str, Any] | None = None

    def _check_options(self) -> None:
        at_least_one = {
            "prompts_per_batch": self.prompts_per_batch,
            "eval_prompts_per_batch": self.eval_prompts_per_batch,
            "max_prompt_tokens": self.renderer.max_prompt_tokens,
            "max_train_rows": self.max_rows["train"],
            "max_eval_rows": self.max_rows["val"],
            "prefetch_prompts": self.prefetch_prompts,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        for name, value in {"num_workers": self.num_workers, "cached_media": self.renderer.cached_media}.items():
            if value < 0:
                raise ValueError(f"data.{name} must be at least 0, got {value}")
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share must be between 0 and 1, got {self.max_skipped_share}")
        if "{problem}" not in self.renderer.question_template:
            raise ValueError(
                f"data.question_template must contain {{problem}}, got {self.renderer.question_template!r}"
            )

    # -- reading the sources -------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Reads and checks the sources that `stage` needs; Lightning calls it before weights are loaded."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}[stage]
        if self.sources[splits[0]] is None:
            raise ValueError(f"`{stage}` reads data.{splits[0]}, which is not set; give it a file or a hub id")
        for split in splits:
            if self.sources[split] is not None:
                self._read(split)
        if stage == "fit":
            self._start_stream()

    def _read(self, split: str) -> None:
        source = self.sources[split]
        rows = list(chain.from_iterable(self._read_rows(one) for one in ([source] if isinstance(source, str) else source)))
        rows = rows[: self.max_rows[split]]
        skips = SkipLog(
            self._skipped_path(), split=split, num_rows=len(rows), max_share=self.max_skipped_share
        )
        self._skips[split] = skips
        self.rows[split] = self._usable(split, rows, skips)
        self._tell_targets(split)

    def _read_rows(self, source: str) -> list[Row | ValueError]:
        return make_rows(read_records(source), self.row_function, self.media_root or media_root_of(source))

    def _usable(self, split: str, rows: list[Row | ValueError], skips: SkipLog) -> list[Row]:
        errors = {index: row for index, row in enumerate(rows) if not isinstance(row, Row)}
        if errors and self.bad_records == "error":
            raise ValueError(
                f"{len(errors)} of {len(rows)} records of data.{split}={self.sources[split]!r} cannot be used; the first:"
                f" {next(iter(errors.values()))}. Set data.bad_records=skip to leave such records out and list them in "
                "skipped.jsonl"
            )
        for index, error in errors.items():
            skips.add(Skipped(-1 - index, id=f"record {index}", path=None, reason=str(error)))  # no place among the rows
        usable = [row for row in rows if isinstance(row, Row)]
        if self.check_files and not self.renderer.blind:
            self._list_missing(usable, skips)
        return usable

    @staticmethod
    def _list_missing(rows: Sequence[Row], skips: SkipLog) -> None:
        """Lists rows whose files do not exist; they stay in the order, and are skipped when their turn comes."""
        exists = {path: os.path.isfile(path) for row in rows for path in (*row.videos, *row.images)}
        for index, row in enumerate(rows):
            missing = [path for path in (*row.videos, *row.images) if not exists[path]]
            if missing:
                skips.add(Skipped(index, row.id, missing[0], "the file does not exist"))

    def _tell_targets(self, split: str) -> None:
        rows = self.rows[split]
        without = sum(not row.reasoning for row in rows)
        if self.renderer.stage == "sft" and without:
            logger.info("%d of %d %s rows have no reasoning: their target is the answer alone", without, len(rows), split)

    def _skipped_path(self) -> Path:
        folder = self.skipped_dir or (self.trainer.default_root_dir if self.trainer else ".")
        return Path(folder) / "skipped.jsonl"

    # -- loaders -------------------------------------------------------------------------------------------------

    def _start_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        rank, world_size = self._data_parallel()
        self._stream = PromptStream(
            RenderedRows(self.rows["train"], self.renderer),
            RowOrder(len(self.rows["train"]), self.seed, rank, world_size),
            self._skips["train"],
            num_workers=self.num_workers,
            prefetch_prompts=self.prefetch_prompts,
            multiprocessing_context=self.multiprocessing_context,
        )
        TrainLoader(self._stream, self.prompts_per_batch)  # says now if a batch is larger than the source
        if self._state is not None:
            self._restore()

    def _data_parallel(self) -> tuple[int, int]:
        """Rank and number of data-parallel ranks; ranks that share a sequence share their prompts."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    @property
    def stream(self) -> PromptStream:
        """The training prompts, once `setup("fit")` has been called."""
        assert self._stream is not None, "setup('fit') comes first"
        return self._stream

    def refill(self, count: int) -> list[Prompt]:
        """`count` further training prompts, for dynamic sampling; they count as consumed."""
        return self.stream.take(count)

    @override
    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.stream, self.prompts_per_batch)

    @override
    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        return self._eval_loader("val") if "val" in self.rows else []

    @override
    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> EvalLoader:
        rank, world_size = self._data_parallel()
        return EvalLoader(
            RenderedRows(self.rows[split], self.renderer),
            self._skips[split],
            self.eval_prompts_per_batch,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            multiprocessing_context=self.multiprocessing_context,
        )

    @override
    def teardown(self, stage: str) -> None:
        """Ends the training workers."""
        if self._stream is not None:
            self._stream.close()

    # -- resuming ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where every rank stands in its rows; Lightning calls it on all ranks and writes rank 0's answer."""
        if self._stream is None:
            return {}
        order = self._stream.order
        return {
            "positions": gather_positions(self._stream.position, order),
            "num_rows": order.num_rows,
            "seed": order.seed,
            "fingerprint": fingerprint(self.rows["train"]),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was saved, now or when `setup("fit")` has been called.

        Raises:
            ValueError: the state is of other rows, another seed or another number of data-parallel ranks.
        """
        self._state = state_dict
        if self._stream is not None:
            self._restore()

    def _restore(self) -> None:
        state, order = self._state, self.stream.order
        self._state = None
        if not state:
            return
        here = {"data-parallel ranks": order.world_size, "data.seed": order.seed, "train rows": order.num_rows}
        then = {"data-parallel ranks": len(state["positions"]), "data.seed": state["seed"], "train rows": state["num_rows"]}
        here["fingerprint of data.train"], then["fingerprint of data.train"] = fingerprint(self.rows["train"]), state["fingerprint"]
        for name, value in here.items():
            if value != then[name]:
                raise ValueError(
                    f"a checkpoint goes on with the rows it was made with, but {name} was {then[name]} and is now {value}; "
                    "restore it, or start a new run from the weights alone with --model.init_from"
                )
        self.stream.seek(state["positions"][order.rank])


def gather_positions(position: int, order: RowOrder) -> list[int]:
    """The positions of all data-parallel ranks, in their order: ranks drift apart as they skip rows and refill."""
    if order.world_size == 1:
        return [position]
    found: list[tuple[int, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (order.rank, position))
    positions = dict(item for item in found if item is not None)
    return [positions[rank] for rank in range(order.world_size)]
