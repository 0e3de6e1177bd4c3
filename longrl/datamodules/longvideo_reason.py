"""`LongVideoReason`: questions about long videos (arXiv:2507.07966) as batches of prompts, for SFT and for RL."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import override

from longrl.datamodules.loading.batches import EvalLoader, TrainLoader
from longrl.datamodules.loading.curriculum import Curriculum, step_budgets
from longrl.datamodules.loading.data_module import Split, StreamedData, check_at_least
from longrl.datamodules.loading.loader import LoaderOptions, PromptStream, RenderedRows
from longrl.datamodules.loading.mixing import (
    DataSource,
    MixedOrder,
    first_rows,
    records_of,
    source_list,
    weights_of,
)
from longrl.datamodules.loading.render import NO_SUBTITLES, KnowsFeatures, RowRenderer, Stage
from longrl.datamodules.loading.row_checks import unusable_rows
from longrl.datamodules.loading.row_order import RowOrder, RowSequence
from longrl.datamodules.loading.skips import SkipLog
from longrl.datamodules.loading.teacher_view import TeacherPrompts, TeacherView, teacher_prompts
from longrl.datamodules.loading.templates import DEFAULT_QUESTION, DEFAULT_RESPONSE, check_templates
from longrl.datamodules.loading.workers import warn_of_small_shared_memory
from longrl.datamodules.media.device_frames import FALLBACKS
from longrl.datamodules.media.media_roots import ANYWHERE, MediaRoots
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, MediaLimits
from longrl.datamodules.media.remote import RemoteMedia, default_folder
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.subtitles import Subtitles, log_subtitles
from longrl.datamodules.rows.other_schemas import suggest_row_function
from longrl.datamodules.rows.pairs import pair_row
from longrl.datamodules.rows.question_rows import ROW_ARGUMENTS, RowFunction, make_rows, row_or_error
from longrl.datamodules.rows.sources import media_root_of
from longrl.datamodules.selection.frame_selection import FrameSelection
from longrl.io.functions import import_function
from longrl.models.reading import RendersPrompts
from longrl.packing.lengths import LengthLimit
from longrl.strategies.parallel import Parallel
from longrl.types import FrameShard, Metrics, Row, UnusableSample

logger = logging.getLogger(__name__)

DEFAULT_ROW_FUNCTION = "longrl.datamodules.rows.longvideo_reason_row"
DEFAULT_SAMPLING = VideoSampling()


class LongVideoReason(StreamedData):
    """Batches of prompts from records with videos, images or text alone.

    Args:
        family: how the model reads prompts; the command line links it to `model.family`.
        train: source of the training rows: a file or a hub id (`longrl.datamodules.rows.sources.read_records`), or
            several. Several are read as one, or, where they have weights, mixed by them
            (`longrl.datamodules.loading.mixing`).
        val: source of the rows for validation, during `fit` and in `validate`; or several.
        test: source of the rows for `test` and `predict`; or several.
        media_root: folder where relative media paths start; by default that of the source, if it is a file.
        row_function: import path (or `file.py:function`) of the function that turns a record into a `Row`.
        stage: `sft` gives prompts their target, from reasoning and answer; `rl` leaves it to be sampled; `preference`
            gives both answers of rows that are pairs.
        question_template: what the model is asked; `{problem}` is the question with its options, `{asked}` the same as
            its set's authors word it (the metadata's `asked`, else the problem), `{instruction}` what they want of
            this kind of question (the metadata's), `{subtitles}` what `subtitles` says, `{num_frames}` and
            `{frame_times}` (seconds) the frames shown. In all templates braces around anything but a name stay, as
            LaTeX's do.
        response_template: SFT target of a row, from its `{reasoning}` and `{answer}`; `{option}` is the wording of the
            right option, for models too small to find its letter (rewards take either).
        answer_template: SFT target of a row without reasoning.
        video: which frames of a video are read.
        selection: what chooses so many frames of a video for a question (docs/selection.md); None goes by time.
        subtitles: which subtitles of a video are shown.
        teacher_view: what a teacher (`model.teacher`) is shown of training rows where it sees more than the policy:
            more frames, subtitles, or by its own question the answer. By default it sees the same.
        blind: leave all media out, to see what the text alone gives away.
        blind_share: share of the training rows without their media and reasoning, so that the model can answer, by
            guessing, when it sees nothing; which rows is decided by their ids.
        prompts_per_batch: prompts of a training step on each data-parallel rank.
        eval_prompts_per_batch: prompts of a validation or test batch on each data-parallel rank.
        max_prompt_tokens: longer prompts are skipped and listed; None for no limit.
        max_train_rows: read only so many rows of `train`, the first ones; of each source that has a weight.
        max_eval_rows: read only so many rows of `val` and of `test`, the first ones.
        seed: decides the order of the training rows.
        num_workers: processes of each loader that decode and render; 0 does it in the trainer's own.
        prefetch_prompts: training prompts rendered ahead by the workers; by default one batch.
        multiprocessing_context: how workers start: `fork`, `spawn` or `forkserver`; None for the platform's default.
        cached_media: decoded videos and images that each worker keeps, for sources that ask often about the same ones.
        decode_chunk_frames: frames of a video that are in memory in the file's own size at once; fewer of large ones.
        max_held_mib: a video whose frames, this rank's shard and at the encoder's size, take more is not handed over in
            memory: the loader decodes it to see that it can be, and it is decoded again while it is encoded.
        media_limits: what one file may cost: pixels of a picture, seconds of length, seconds of decoding. A row with
            one above them is skipped.
        bad_records: what happens to a record that lacks a field, has an answer outside its options or places media that
            it lacks: `error`, before weights are loaded, or `skip`, listed and counted like a broken video.
        allow_outside_paths: read media that rows name outside `media_root`, or outside the source's folder where there
            is none; without it such rows are skipped, wherever links and `..` lead.
        check_files: look in `setup` whether all media exist; off for slow file systems.
        allow_remote_media: fetch media that a row names by URL (`https://`, `s3://`, `gs://`, `hf://`, whatever fsspec
            reads) when they are first needed; otherwise such rows are skipped, and nothing is ever fetched.
        media_cache_dir: where they are kept, for all runs; by default `~/.cache/longrl/media`. Nothing deletes them.
        skipped_dir: folder of `skipped.jsonl`, which lists skipped rows; by default the run's, `default_root_dir`.
        shuffle_frames: show videos with their temporal patches in another order, which follows from the row's id, in
            `validate`, `test`, `predict` and `evaluate`; features are as they are, only their rows are moved.
        max_skipped_share: share of a source's rows that may be skipped; see `longrl.datamodules.loading.skips.SkipLog`.
        curriculum: which training rows come next, by how they were answered, and which frames they show, by step;
            None: all rows in every epoch, in random order.

    Example:
        `LongVideoReason(family, train="data/synthetic/train.jsonl", val="data/synthetic/eval.jsonl", stage="sft")`
    """

    # `Path` keeps the command line from reading a data file as YAML, which takes minutes and believes what is in it.
    def __init__(
        self,
        family: RendersPrompts,
        train: str | list[str | DataSource] | Path | None = None,
        val: str | list[str | DataSource] | Path | None = None,
        test: str | list[str | DataSource] | Path | None = None,
        media_root: str | None = None,
        row_function: str = DEFAULT_ROW_FUNCTION,
        stage: Stage = "rl",
        question_template: str = DEFAULT_QUESTION,
        response_template: str = DEFAULT_RESPONSE,
        answer_template: str = "{answer}",
        video: VideoSampling = DEFAULT_SAMPLING,
        selection: FrameSelection | None = None,
        subtitles: Subtitles = NO_SUBTITLES,
        teacher_view: TeacherView | None = None,
        blind: bool = False,
        blind_share: float = 0.0,
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
        decode_chunk_frames: int = 32,
        max_held_mib: int = 2048,
        media_limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
        bad_records: Literal["error", "skip"] = "error",
        allow_outside_paths: bool = False,
        check_files: bool = True,
        allow_remote_media: bool = False,
        media_cache_dir: str | None = None,
        skipped_dir: str | None = None,
        max_skipped_share: float = 0.05,
        curriculum: Curriculum | None = None,
        shuffle_frames: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, prompts_per_batch=prompts_per_batch, eval_prompts_per_batch=eval_prompts_per_batch)
        check_at_least(1, max_prompt_tokens=max_prompt_tokens, prefetch_prompts=prefetch_prompts)
        check_at_least(1, max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
        check_at_least(0, num_workers=num_workers, cached_media=cached_media)
        for name, share in (("max_skipped_share", max_skipped_share), ("blind_share", blind_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"data.{name} must be between 0 and 1, got {share}")
        if stage == "preference" and blind_share:
            raise ValueError(
                f"data.blind_share must be 0 with data.stage=preference, got {blind_share}: answers of a pair speak "
                "of what was shown"
            )
        check_templates(question_template, response_template, answer_template, subtitles)
        if not num_workers and (prefetch_prompts or multiprocessing_context):
            logger.warning("data.prefetch_prompts and data.multiprocessing_context do nothing with data.num_workers=0")
        self.sources = {"train": source_list(train), "val": source_list(val), "test": source_list(test)}
        self.weights = weights_of("train", self.sources["train"])
        for split in ("val", "test"):
            if weights_of(split, self.sources[split]):
                raise ValueError(f"weights are for data.train alone, got some in data.{split}; leave them out there")
        self.max_rows: dict[Split, int | None] = {"train": max_train_rows, "val": max_eval_rows, "test": max_eval_rows}
        self.media_root = media_root
        named = {row_function, *(one.row_function for one in chain(*self.sources.values()) if one.row_function)}
        self.row_functions = {path: import_function(path, "data.row_function", ROW_ARGUMENTS) for path in named}
        self.row_function = row_function
        self.teacher_view = teacher_view
        self.prompts_per_batch = prompts_per_batch
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.seed = seed
        self.loader_options = LoaderOptions(num_workers, prefetch_prompts or prompts_per_batch, multiprocessing_context)
        self.curriculum = curriculum
        self.bad_records = bad_records
        self.check_files = check_files
        self.allow_outside_paths = allow_outside_paths
        cache_dir = media_cache_dir or default_folder()
        self.skipped_dir = skipped_dir
        self.max_skipped_share = max_skipped_share
        self.renderer = RowRenderer(
            family=family,
            video=video,
            selection=selection,
            stage=stage,
            question_template=question_template,
            response_template=response_template,
            answer_template=answer_template,
            blind=blind,
            blind_share=blind_share,
            shuffle_frames=shuffle_frames,
            max_prompt_tokens=max_prompt_tokens,
            subtitles=subtitles,
            cached_media=cached_media,
            decoding=DecodeLimits(decode_chunk_frames, max_held_mib, media_limits),
            remote=RemoteMedia(
                cache_dir if allow_remote_media else None,
                # Frames of a list that was copied lie where the copies are.
                self._roots(chain(*self.sources.values()), [cache_dir] if allow_remote_media else []),
            ),
        )
        if media_cache_dir and not allow_remote_media:
            logger.warning("data.media_cache_dir does nothing without data.allow_remote_media=true")
        self.datasets: dict[Split, RenderedRows] = {}
        """Splits that have been read so far."""
        self._sizes: dict[Split, tuple[int, ...]] = {}
        """Rows of each source."""
        self._skips: dict[Split, SkipLog] = {}

    # -- reading the sources -------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Reads as `StreamedData.setup`; ranks of a sequence-parallel group decode their own frames."""
        if stage == "fit" and self.curriculum is not None:
            ahead = self.loader_options.rendered_ahead
            shown = self.renderer.stage, self.sources["train"], self.renderer.video
            self.curriculum.check(*shown, self.prompts_per_batch, ahead)
        parallel = self._parallel()
        sp_group = parallel.sp_group
        self.renderer.shard = FrameShard(sp_group.rank, sp_group.size)
        self.renderer.patch_dtype = getattr(torch, parallel.compute_dtype or self.renderer.family.dtype)
        if self.trainer is not None:
            on_gpu = self.trainer.strategy.root_device.type == "cuda"
            self.loader_options = replace(self.loader_options, pin_memory=on_gpu)
        self.renderer.teacher = self._teacher_prompts(parallel.compute_dtype) if stage == "fit" else None
        super().setup(stage)

    @override
    def counts(self) -> Metrics:
        """What was to be decoded on the encoder's device and was not."""
        return FALLBACKS.metrics() if self.renderer.video.decode_on == "encoder" else {}

    def _teacher_prompts(self, compute_dtype: str | None) -> TeacherPrompts | None:
        """What makes the prompts of the run's teachers, where they differ from the policy's."""
        module = None if self.trainer is None else self.trainer.lightning_module
        distiller = getattr(module, "distiller", None)  # of a policy; other modules have none
        teachers = [] if distiller is None else distiller.teachers
        if self.teacher_view is not None and not teachers:
            logger.warning("data.teacher_view does nothing in a run without model.teacher")
        return teacher_prompts(teachers, self.renderer, self.teacher_view, compute_dtype)

    @override
    def read_split(self, split: Split) -> None:
        if split == "train" and self.renderer.shuffle_frames:
            raise ValueError(
                "data.shuffle_frames=true is for `validate`, `test`, `predict` and `evaluate`: nothing is trained on "
                "shuffled frames; set it to false (rollout.frame_order compares training rollouts with shuffled ones)"
            )
        weights = self.weights if split == "train" else None
        read = [functools.partial(self._read_source, one, split) for one in self.sources[split]]
        by_source = first_rows((each() for each in read), self.max_rows[split], of_each=bool(weights))
        results = list(chain.from_iterable(by_source))
        rows = [row for row in results if isinstance(row, Row)]
        errors = [(index, error) for index, error in enumerate(results) if isinstance(error, ValueError)]
        if errors:
            names = ", ".join(one.source for one in self.sources[split])
            suggestion = self._suggestion(split)
            problem = (
                f"{len(errors)} of {len(results)} records of data.{split} ({names}) cannot be used; the first: "
                f"{errors[0][1]}{suggestion}"
            )
            if self.bad_records == "error":
                raise ValueError(f"{problem}. Or leave such records out with data.bad_records=skip")
            if suggestion:
                logger.warning("%s", problem)
        self._sizes[split] = tuple(sum(isinstance(row, Row) for row in of_one) for of_one in by_source)
        self._skips[split] = skips = SkipLog(
            Path(self.skipped_dir or (self.trainer.default_root_dir if self.trainer else "."), "skipped.jsonl"),
            split=split,
            num_rows=len(results),
            max_share=self.max_skipped_share,
            writes_known=self.trainer is None or self.trainer.is_global_zero,
            writes=self._parallel().sp_group.rank == 0,
        )
        render = replace(self.renderer)
        if split != "train":  # nothing is taught
            render = replace(render, blind_share=0.0, teacher=None)
        # Records that gave no row have negative indices, apart from those of rows.
        unusable = [UnusableSample(None, str(error), -1 - index, f"record {index}") for index, error in errors]
        if not self.renderer.blind:
            of_sources = zip(self.sources[split], self._sizes[split], strict=True)
            roots = [one_root for one, size in of_sources for one_root in [self._roots([one])] * size]
            unusable += unusable_rows(rows, render, self.check_files, roots, skips.allowed)
        skips.add_known(unusable)
        render.try_options(rows)
        if render.teacher is not None and self.teacher_view is not None:
            self.teacher_view.check_rows(rows, render.question_template)
            if self.teacher_view.subtitles is not None:
                log_subtitles(split, rows, self.teacher_view.subtitles)
        self.datasets[split] = RenderedRows(rows, render)
        logger.info("data.%s: %d rows", split, len(rows))
        without = sum(not (row.reasoning or row.trace) and row.response is None for row in rows)
        if self.renderer.stage == "sft" and without:
            logger.info("%d of %d %s rows have no reasoning: they teach the answer alone", without, len(rows), split)
        log_subtitles(split, rows, self.renderer.subtitles)

    def _read_source(self, one: DataSource, split: Split) -> list[Row | ValueError]:
        rows = make_rows(records_of(one), *self._reading(one))
        if self.renderer.stage == "preference" and split == "train":  # other splits may ask questions as well
            return [row_or_error(pair_row, row) if isinstance(row, Row) else row for row in rows]
        return rows

    def _reading(self, one: DataSource) -> tuple[RowFunction, str | None]:
        """Row function and media root of a source."""
        row_function = self.row_functions[one.row_function or self.row_function]
        return row_function, one.media_root or self.media_root or media_root_of(one.source)

    def _roots(self, sources: Iterable[DataSource], others: Sequence[str] = ()) -> MediaRoots:
        """Where media of these sources' rows may lie."""
        if self.allow_outside_paths:
            return ANYWHERE
        return MediaRoots.below([*(self._reading(one)[1] for one in sources), *others])

    def _suggestion(self, split: Split) -> str:
        """What would read records that cannot be used, as the end of a sentence."""
        for one in self.sources[split]:
            suggestion = suggest_row_function(records_of(one), *self._reading(one))
            if suggestion:
                return f"; {suggestion}"
        return ""

    def skips(self, split: Split) -> SkipLog:
        """Which rows of a split that was read cannot be used."""
        return self._skips[split]

    def skip_decoding_if_cached(self, stored: KnowsFeatures, splits: Sequence[Split]) -> None:
        """From now on, videos of these splits are not decoded if their features are stored."""
        for split in self.datasets.keys() & splits:
            self.datasets[split].render = replace(self._renderer(split), stored=stored)

    def limit_lengths(self, limits: Sequence[LengthLimit], splits: Sequence[Split]) -> None:
        """From now on, longer prompts of these splits are skipped: update or engine could not take them."""
        for split in self.datasets.keys() & splits:
            self.datasets[split].render = self._renderer(split).with_limits(limits)

    def _renderer(self, split: Split) -> RowRenderer:
        """What makes prompts of a split that was read."""
        renderer = self.datasets[split].render
        assert isinstance(renderer, RowRenderer)
        return renderer

    # -- loaders -------------------------------------------------------------------------------------------------

    @override
    def start_stream(self) -> None:
        for family in self.renderer.families:
            family.load_processing()
        rank, world_size = self.data_parallel()
        dataset = self.datasets["train"]
        num_workers = self.loader_options.num_workers
        if num_workers and any(row.videos for row in dataset.rows):
            per_worker = -(-self.loader_options.prefetch_prompts // num_workers)
            warn_of_small_shared_memory(num_workers * per_worker, self._renderer("train").most_held_bytes)
        order: RowSequence = RowOrder(len(dataset), self.seed, rank, world_size)
        if self.weights:
            order = MixedOrder(len(dataset), self.seed, rank, world_size, self._sizes["train"], self.weights)
        marks = self.curriculum is not None
        if self.curriculum is not None and self.curriculum.draws_rows:
            sources = self._sizes["train"], self.sources["train"]
            place = (self.seed, rank, world_size, self.prompts_per_batch)
            order = self.curriculum.order(dataset.rows, *sources, *place)
        per_batch = self.prompts_per_batch
        budgets = step_budgets(self.curriculum, self.renderer.family, self.renderer.video, self.trainer, per_batch)
        sp_group, skips, options = self._parallel().sp_group, self._skips["train"], self.loader_options
        self.start(PromptStream(dataset, order, skips, options, sp_group, budgets, marks))

    def _parallel(self) -> Parallel:
        """The ranks of the run, as its strategy told the module that is trained."""
        if self.trainer is None:
            return Parallel()
        parallel = self.trainer.lightning_module.parallel
        assert isinstance(parallel, Parallel)
        return parallel

    @override
    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self.stream, self.prompts_per_batch)

    @override
    def eval_loader(self, split: Split) -> EvalLoader:
        rank, world_size = self.data_parallel()
        prompts = self.eval_prompts_per_batch
        options = replace(self.loader_options, prefetch_prompts=prompts)
        dataset, skips, sp_group = self.datasets[split], self._skips[split], self._parallel().sp_group
        return EvalLoader(dataset, skips, prompts, rank=rank, world_size=world_size, options=options, sp_group=sp_group)
