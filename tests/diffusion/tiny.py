"""Tiny pipelines and runs that the tests of flow models share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.prompt_files import PromptBatch
from longrl.diffusion.rollout_callback import DiffusionRolloutCallback
from longrl.diffusion.sampler import DiffusionSampling
from longrl.diffusion.sd3 import SD3Family
from longrl.diffusion.wan import WanFamily
from longrl.rewards import RewardSum, RewardTerm
from longrl.testing.tiny_diffusion import tiny_sd3, tiny_wan
from longrl.types import Row


@functools.cache
def sd3_folder() -> str:
    return str(tiny_sd3(tempfile.mkdtemp(prefix="longrl-sd3-")))


@functools.cache
def wan_folder(num_heads: int = 2) -> str:
    return str(tiny_wan(tempfile.mkdtemp(prefix="longrl-wan-"), num_heads=num_heads))


def sd3_family(folder: str | None = None, **kwargs: object) -> SD3Family:
    """Pictures of 16 x 16: latents [4, 8, 8]."""
    return SD3Family(folder or sd3_folder(), **{"height": 16, "width": 16, "max_text_tokens": 8, **kwargs})


def wan_family(folder: str | None = None, **kwargs: object) -> WanFamily:
    """Videos of 5 frames of 32 x 48: latents [4, 2, 4, 6], 12 tokens."""
    defaults = {"height": 32, "width": 48, "num_frames": 5, "max_text_tokens": 8}
    return WanFamily(folder or wan_folder(), **{**defaults, **kwargs})


FAMILIES = {"sd3": sd3_family, "wan": wan_family}


def rows(*texts: str) -> list[Row]:
    return [Row(id=str(index), problem=text, answer="") for index, text in enumerate(texts)]


# ---- runs ----


def redness(frames: Tensor, row: Row) -> float:
    """Between -1 and 1, from frames [F, 3, H, W]."""
    red, green, blue = (frames[:, channel].float().mean() / 255 for channel in range(3))
    return float(red - (green + blue) / 2)


class PromptRows(LightningDataModule):
    """The same few prompts in every batch."""

    def __init__(self, texts: Sequence[str] = ("a red picture", "a small cat"), num_batches: int = 1) -> None:
        super().__init__()
        self.rows, self.num_batches = rows(*texts), num_batches

    def train_dataloader(self) -> list[PromptBatch]:
        return Batches(self.rows, self.num_batches)

    def val_dataloader(self) -> list[PromptBatch]:
        return Batches(self.rows, 1)


class Batches:
    def __init__(self, rows: Sequence[Row], count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[PromptBatch]:
        for _ in range(self.count):
            yield PromptBatch(prompts=list(self.rows))


class Record(Callback):
    """What a run did: samples of each rollout, gradients of each optimizer step, metrics of each batch."""

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.groups.append(batch.groups)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    module: DiffusionModule, sampling: DiffusionSampling, *, steps: int = 1, data: Any = None, **kwargs: Any
) -> Record:
    """A short run in this process."""
    record = Record()
    reward = RewardSum([RewardTerm(redness)])
    rollout = DiffusionRolloutCallback(reward, sampling, samples_per_batch=kwargs.pop("samples_per_batch", 8))
    trainer = Trainer(
        accelerator="cpu", devices=kwargs.pop("devices", 1), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, max_epochs=-1, max_steps=steps,
        callbacks=[rollout, record], **kwargs,
    )  # fmt: skip
    trainer.fit(module, data or PromptRows())
    return record
