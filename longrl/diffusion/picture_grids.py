"""Generated pictures and videos to look at: grids of samples with their rewards, as the run goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.prompt_files import PromptBatch
from longrl.diffusion.trajectory_rows import TrajectoryGroup
from longrl.evaluation.sample_grids import FOLDER, PromptSamples, animated_grid, encode_images, is_video, picture_grid
from longrl.io.atomic import atomic_write
from longrl.io.jsonl import drop_records
from longrl.io.number_ranges import check_ranges


class PictureGrids(Callback):
    """Writes a grid of samples at every validation, and of training samples every so many optimizer steps.

    Files are `pictures/val_000100.png` and `pictures/step_000100.png`, of videos a contact sheet, with an animation
    beside it (`.webp`); the number is that of the optimizer steps done by the weights that drew them.
    `pictures/samples.jsonl` has prompt, reward and parts of each sample shown. Weights & Biases gets the same pictures,
    if the run logs to it.

    Args:
        every_n_steps: how often training samples are shown, from the first rollout on: each that begins at a multiple,
            or is the first one behind it. 0 never.
        num_prompts: prompts shown each time.
        num_samples: samples of each.
        tile: pixels of the longer side of a picture in the grid.
        max_frames: frames of a video in the contact sheet.
        fps: frames per second of the animation.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        num_prompts: int = 8,
        num_samples: int = 4,
        tile: int = 160,
        max_frames: int = 6,
        fps: float = 8.0,
    ) -> None:
        if min(num_prompts, num_samples, tile, max_frames, fps) < 1 or every_n_steps < 0:
            raise ValueError(
                "num_prompts, num_samples, tile, max_frames and fps of PictureGrids must be at least 1, every_n_steps "
                f"at least 0, got {num_prompts}, {num_samples}, {tile}, {max_frames}, {fps} and {every_n_steps}"
            )
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.tile = tile
        self.max_frames = max_frames
        check_ranges(locals(), "PictureGrids: ", fps=(1, 1000))
        self.fps = fps
        self._step = 0
        """Optimizer steps done when the rollout was drawn."""
        self._validated: list[TrajectoryGroup] = []

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes out records that a run that goes on will write again; pictures are replaced by their like."""
        done = trainer.global_step

        def is_repeated(record: dict[str, Any]) -> bool:
            # The step of training samples is that before the update, validation belongs to the update before it.
            step = record.get("step", 0)
            return step > done or (step == done and str(record.get("file")).startswith("step_"))

        if trainer.is_global_zero:
            drop_records(Path(trainer.default_root_dir, FOLDER, "samples.jsonl"), is_repeated)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        every = self.every_n_steps
        if every and self._step // every > (self._step - pl_module.steps_per_rollout) // every:
            self._show(trainer, pl_module, "step", self._step, batch.groups or [])

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validated += (batch.groups or [])[: self.num_prompts - len(self._validated)]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        groups, self._validated = self._validated, []
        self._show(trainer, pl_module, "val", trainer.global_step, groups)

    # -- work ----------------------------------------------------------------------------------------------------

    def _show(
        self, trainer: Trainer, module: DiffusionModule, stage: str, step: int, groups: Sequence[TrajectoryGroup]
    ) -> None:
        if not groups or not trainer.is_global_zero:
            return
        # 1. The first samples of the first prompts, decoded one by one: a video takes much memory.
        rows: list[PromptSamples] = []
        records: list[dict[str, Any]] = []
        for group in groups[: self.num_prompts]:
            samples = sample_records(group, self.num_samples)
            frames = [module.decode_samples([sample])[0] for sample in group.completions[: self.num_samples]]
            rows.append(PromptSamples(group.prompt.row.problem, frames, [sample_caption(sample) for sample in samples]))
            records += samples

        # 2. Files.
        name = f"{stage}_{step:06}"
        grid = picture_grid(rows, tile=self.tile, max_frames=self.max_frames)
        moments = animated_grid(rows, tile=self.tile) if is_video(rows) else []
        folder = Path(trainer.default_root_dir, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{name}.png", encode_images([grid], "png"))
        if moments:
            atomic_write(folder / f"{name}.webp", encode_images(moments, "webp", fps=self.fps))
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for record in records:
                line = {"file": f"{name}.png", "step": step, **record}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

        # 3. Weights & Biases.
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"pictures/{stage}", [grid], step=step)
                if moments:  # of animations Weights & Biases takes GIF alone
                    gif = io.BytesIO(encode_images(moments, "gif", fps=self.fps))
                    logger.log_video(f"videos/{stage}", [gif], step=step, format=["gif"])


def sample_caption(sample: dict[str, Any]) -> str:
    """The caption of a sample: its reward, and the parts if there are several."""
    if not sample["valid"]:
        return "reward failed"
    parts = sample["parts"]
    values = [f"{name} {value:.2f}" for name, value in parts.items()] if len(parts) > 1 else []
    return ", ".join([f"{sample['reward']:.3f}", *values])


def sample_records(group: TrajectoryGroup, count: int) -> list[dict[str, Any]]:
    """One dict for each of the first `count` samples of a scored group, the parts of its reward included."""
    return [
        {
            "id": group.prompt.row.id,
            "prompt": group.prompt.row.problem,
            "sample": index,
            "reward": float(group.rewards[index]),
            "valid": bool(group.valid[index]),
            "parts": {
                name: float(values[index]) for name, values in group.reward_parts.items() if not values[index].isnan()
            },
        }
        for index in range(min(count, len(group.completions)))
    ]
