"""Generated pictures and videos to look at: grids of samples with their rewards, as the run goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from longrl.evaluation.sample_grids import FOLDER, PromptSamples, animated_grid, encoded, is_video, picture_grid
from longrl.io.atomic import atomic_write
from longrl.types import Group


class PictureGrids(Callback):
    """Writes a grid of samples at every validation, and of training samples every so many optimizer steps.

    Files are `pictures/val_000100.png` and `pictures/step_000100.png`, of videos a contact sheet, with an animation
    beside it (`.webp`); the number is that of the optimizer steps done by the weights that drew them.
    `pictures/samples.jsonl` has prompt, reward and parts of each sample shown. Weights & Biases gets the same pictures,
    if the run logs to it. Samples are the `frames` of a group's completions.

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
                "num_prompts, num_samples, tile, max_frames and fps of PictureGrids must be at least 1 and every_n_steps "
                f"at least 0, got {num_prompts}, {num_samples}, {tile}, {max_frames}, {fps} and {every_n_steps}"
            )
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.tile = tile
        self.max_frames = max_frames
        self.fps = fps
        self._step = 0
        """When the rollout was drawn."""
        self._validated: list[Group] = []

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, per_rollout = self.every_n_steps, cast(int, pl_module.steps_per_rollout)
        if every and self._step // every > (self._step - per_rollout) // every:
            self._show(trainer, f"step_{self._step:06}", batch.groups or ())

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validated += (batch.groups or [])[: self.num_prompts - len(self._validated)]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups, self._validated = self._validated, []
        self._show(trainer, f"val_{trainer.global_step:06}", groups)

    # -- work ----------------------------------------------------------------------------------------------------

    def _show(self, trainer: Trainer, name: str, groups: Sequence[Group]) -> None:
        if not groups or not trainer.is_global_zero:
            return
        groups = groups[: self.num_prompts]
        rows = [grid_row(group, self.num_samples) for group in groups]
        grid = picture_grid(rows, tile=self.tile, max_frames=self.max_frames)
        moments = animated_grid(rows, tile=self.tile) if is_video(rows) else []
        folder = Path(trainer.default_root_dir, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{name}.png", encoded([grid], "png"))
        if moments:
            atomic_write(folder / f"{name}.webp", encoded(moments, "webp", fps=self.fps))
        stage, step = name.split("_")
        about = {"file": f"{name}.png", "step": int(step)}
        lines = [about | sample for group in groups for sample in group_samples(group, self.num_samples)]
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"pictures/{stage}", [grid], step=int(step))
                if moments:  # of animations Weights & Biases takes GIF alone
                    gif = io.BytesIO(encoded(moments, "gif", fps=self.fps))
                    logger.log_video(f"videos/{stage}", [gif], step=int(step), format=["gif"])


def grid_row(group: Group, count: int) -> PromptSamples:
    """The first samples of a group as a row of a grid, each with its reward and its parts."""
    samples = group_samples(group, count)
    frames = [completion.frames for completion in group.completions[:count]]  # type: ignore[attr-defined]
    return PromptSamples(group.prompt.row.problem, frames, [caption(sample) for sample in samples])


def caption(sample: dict[str, Any]) -> str:
    """What stands under a sample: its reward, and the parts if there are several."""
    if not sample["valid"]:
        return "reward failed"
    parts = sample["parts"]
    more = [f"{name} {value:.2f}" for name, value in parts.items()] if len(parts) > 1 else []
    return ", ".join([f"{sample['reward']:.3f}", *more])


def group_samples(group: Group, count: int) -> list[dict[str, Any]]:
    """One dict for each of the first `count` samples of a scored group, the parts of its reward included."""
    assert group.rewards is not None
    assert group.valid is not None
    return [
        {
            "id": group.prompt.row.id,
            "prompt": group.prompt.row.problem,
            "sample": index,
            "reward": float(group.rewards[index]),
            "valid": bool(group.valid[index]),
            "parts": {name: float(values[index]) for name, values in group.reward_parts.items()},
        }
        for index in range(min(count, len(group.completions)))
    ]
