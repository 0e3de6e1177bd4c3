"""`python -m longrl cache-features`: encodes all media of a run before it starts, so that it only reads features."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longrl.commands.closing import say_end
from longrl.commands.run_parts import RunParts
from longrl.datamodules.loading.data_module import Split
from longrl.datamodules.loading.loader import usable_items
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.features.files import FeatureFiles
from longrl.io.progress import SPEED_OF_S
from longrl.modules.policy import PolicyModule
from longrl.types import Prompt, Row, UnusableSample

logger = logging.getLogger(__name__)

GIB = 1 << 30
DESCRIPTION = """Encodes all media of the train, val and test rows that are not in model.feature_cache_dir yet. Under
torchrun every process takes its part of the videos, on a GPU of its own."""


def main(args: Sequence[str]) -> None:
    """Command line of `CacheFiller`."""
    parts = RunParts("cache-features", args, DESCRIPTION)
    settings = parts.config["trainer"]
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rollouts = parts.rollout_callback() is not None
    trainer = local_trainer(settings["accelerator"], settings["precision"])
    CacheFiller(parts.model, parts.datamodule, trainer, rollouts, rank, world_size).run()


def local_trainer(accelerator: str, precision: Any) -> Trainer:
    """A trainer of this process alone, for its device and precision, whoever started the process."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*GPU available but not used.*")
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[torch.cuda.current_device()] if on_gpu else 1,
        precision=precision,
        plugins=[LightningEnvironment()],  # else Lightning takes torchrun's processes for ranks of this trainer
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@dataclass
class Counts:
    """Counts of what was done so far."""

    videos: int = 0
    """Combinations of media looked at, one or several in a row of the data."""
    hits: int = 0
    """Media whose features were there."""
    encoded: int = 0
    skipped: int = 0
    """Rows that cannot be used."""
    num_bytes: int = 0
    """Bytes written."""


class CacheFiller:
    """Walks all rows of the configured splits and stores the features that are missing.

    Args:
        policy: has family, weights and the folder.
        data: has the rows.
        trainer: has device and precision.
        rollouts: whether the run has a rollout callback, which encodes evaluation prompts outside the step's precision.
        rank: takes every `world_size`-th video.
        world_size: processes that share the work.
    """

    def __init__(
        self,
        policy: PolicyModule,
        data: LongVideoReason,
        trainer: Trainer,
        rollouts: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if policy.features.disk is None:
            raise ValueError(
                "`cache-features` writes to model.feature_cache_dir, which is not set; name a folder there, and give "
                "`fit` the same"
            )
        self.policy, self.data, self.trainer = policy, data, trainer
        self.rollouts, self.rank, self.world_size = rollouts, rank, world_size
        self.disk = policy.features.disk
        self.counts = Counts()

    def run(self) -> Counts:
        """Everything, with a progress bar and a summary."""
        # Unusable rows are listed beside the features, not in the run's folder.
        self.data.skipped_dir = self.data.skipped_dir or self.disk.folder
        self.data.read(("train", "val", "test"))
        if not self.data.datasets:
            raise ValueError("`cache-features` reads data.train, data.val and data.test, none of which is set")
        self._load_encoder()
        with progress_bar(self.rank, self.world_size) as bar:
            for split in list(self.data.datasets):
                self._fill(split, bar)
        self._summary()
        return self.counts

    def _load_encoder(self) -> None:
        """Weights in the run's precision; only what encodes goes to the device."""
        self.policy.configure_model()
        self.trainer.precision_plugin.convert_module(self.policy)
        assert self.policy.model is not None
        self.model = self.policy.model
        media_encoders = self.policy.family.media_encoders(self.model)
        if not media_encoders:
            raise ValueError(f"{type(self.policy.family).__name__} reads text only: it has no features to store")
        for module in media_encoders:
            module.to(self.trainer.strategy.root_device)

    def _precision(self, split: Split) -> contextlib.AbstractContextManager[None]:
        """As in training: SFT encodes within the step, rollouts do so before it."""
        before_the_step = self.data.renderer.stage == "rl" if split == "train" else self.rollouts
        return contextlib.nullcontext() if before_the_step else self.trainer.precision_plugin.forward_context()

    def _fill(self, split: Split, bar: Progress) -> None:
        dataset, skips = self.data.datasets[split], self.data.skips(split)
        rows, render = dataset.rows, cast(RowRenderer, dataset.render)
        groups = rows_by_media(rows, render)[self.rank :: self.world_size]
        before = replace(self.counts)
        task = bar.add_task(split, total=len(groups), **self._shown(before))
        with self._precision(split):
            cache = self.disk.files(self.model)
        self.data.skip_decoding_if_cached(cache, [split])
        while groups:
            again = []
            items = self.data.loader_options.render(dataset, [group[0] for group in groups])
            for group, item in zip(groups, items, strict=True):
                usable_items([item], skips)
                if not isinstance(item, UnusableSample):
                    with self._precision(split):
                        self._store(item, cache)
                elif item.path is not None:  # a broken file breaks all rows that show it
                    for index in group[1:]:
                        usable_items([item.of_row(index, rows[index].id)], skips)
                elif len(group) > 1:  # unusable for its own sake, too long say: another row with the same media is not
                    again.append(group[1:])
                    continue
                self.counts.videos += 1
                self.counts.skipped = sum(len(self.data.skips(name)) for name in self.data.datasets)
                bar.update(task, advance=1, **self._shown(before))
            groups = again

    def _store(self, prompt: Prompt, cache: FeatureFiles) -> None:
        missing = {item.key for item in prompt.media if not cache.has(item.key)}
        self.counts.hits += len({item.key for item in prompt.media}) - len(missing)
        self.counts.encoded += len(missing)
        if missing:
            self.policy.features.get_or_encode(self.model, [prompt])
            self.counts.num_bytes += int(self.disk.take_counts()["written_bytes"])
            if not all(cache.has(key) for key in missing):
                raise ValueError(
                    f"features cannot be stored in model.feature_cache_dir={self.disk.folder}: the warning above "
                    "says why; free space, raise model.feature_cache_disk_bytes, or name another folder. What is "
                    "stored stays"
                )

    def _shown(self, before: Counts) -> dict[str, Any]:
        """Numbers on the bar of the split that began at `before`."""
        hits, encoded = self.counts.hits - before.hits, self.counts.encoded - before.encoded
        return {"hits": hits, "encoded": encoded, "gib": (self.counts.num_bytes - before.num_bytes) / GIB}

    def _summary(self) -> None:
        counts, cache = self.counts, self.disk.files(self.model)
        who = f"rank {self.rank} of {self.world_size}: " if self.world_size > 1 else ""
        lines = [
            f"{who}{counts.videos} videos looked at: {counts.encoded} media encoded "
            f"({counts.num_bytes / GIB:.2f} GiB), {counts.hits} were there, {counts.skipped} rows skipped",
            f"{self.disk.folder} holds {cache.num_bytes() / GIB:.2f} GiB of {self.disk.max_bytes / GIB:.2f}",
        ]
        if cache.num_evicted:
            lines.append(f"{cache.num_evicted} files were removed: raise model.feature_cache_disk_bytes to keep them")
        if counts.skipped:
            lines.append(f"skipped rows are listed in {self.data.skipped_dir}/skipped.jsonl")
        Console().print("\n".join(lines), soft_wrap=True, highlight=False)
        say_end([], [f"`fit` with the same options reads {self.disk.folder}: it decodes and encodes nothing again"])


def rows_by_media(rows: Sequence[Row], render: RowRenderer) -> list[list[int]]:
    """Indices of rows that show the same frames of the same media, one list for each combination, in the order met."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if (row.videos or row.images or row.audios) and not render.drops_media(row):
            groups.setdefault((row.videos, row.images, row.audios, render.media_question(row)), []).append(index)
    return list(groups.values())


@contextlib.contextmanager
def progress_bar(rank: int, world_size: int) -> Iterator[Progress]:
    """A bar for each split: videos done, hits, GiB written, time left. Rank 0 shows its own part for all."""
    part = f" (rank 0 of {world_size})" if world_size > 1 else ""
    columns = (
        TextColumn(f"{{task.description}}{part}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[hits]} there, {task.fields[encoded]} encoded, {task.fields[gib]:.2f} GiB"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=rank != 0, speed_estimate_period=SPEED_OF_S) as bar:
        yield bar
