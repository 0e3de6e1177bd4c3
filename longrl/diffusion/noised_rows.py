"""Finished samples noised again, for objectives on the forward process: rows of a clean latent, noise and a sigma.

    noisy = (1 - s) clean + s noise,    velocity wanted = noise - clean

Which sigmas a sample gets and what noise follow from its seed, so they are the same on any number of ranks, in any
micro-batches, and in a run that goes on.

Letters: M items (a sample, or a pair of samples) of an optimizer step, K times of each, U = M * K rows of a step or of
a micro-batch, R = U * samples of an item. The dots stand for the axes of a latent, D for all of its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.diffusion.sampler import Trajectory, seeded_noise
from longrl.diffusion.steps import broadcast_rows
from longrl.engines.rollout_engine import prompt_seed
from longrl.types import to_device


@dataclass(frozen=True)
class Item:
    """What has a loss: one sample, or a pair of samples of a prompt, the better first."""

    samples: tuple[Trajectory, ...]
    text: str


@dataclass(frozen=True)
class Items:
    """The items of an optimizer step."""

    items: Sequence[Item]
    weights: Tensor
    """[M] that add up to 1 over all ranks."""
    scores: Tensor
    """[M] advantages of samples; of pairs nothing reads them."""


@dataclass(frozen=True)
class NoiseLevels:
    """The sigmas of a schedule that samples are noised to, and the model's timesteps for them."""

    sigmas: Sequence[float]
    """S, from 1 down."""
    timesteps: Sequence[float]
    """S."""


@dataclass(frozen=True)
class NoisedRow:
    """An item at one sigma; the samples of a pair get the same noise (as Diffusion-DPO's code gives them)."""

    item: Item
    item_index: int
    """Number of the item in the optimizer step."""
    level: int
    """Index into `NoiseLevels`."""
    draw: str
    """Name of its noise among that of its first sample's seed."""


def noised_rows(items: Sequence[Item], num_levels: int, times: int, epoch: int) -> list[NoisedRow]:
    """All U rows, item after item: `times` levels of each, none twice.

    Args:
        items: M of them.
        num_levels: S of the schedule.
        times: K, at most S.
        epoch: number of the time that the rollout is gone through; another one draws other levels and noise.
    """
    rows: list[NoisedRow] = []
    for item_index, item in enumerate(items):
        seed = prompt_seed(item.samples[0].seed, f"levels {epoch}")
        generator = torch.Generator().manual_seed(seed)
        levels = torch.randperm(num_levels, generator=generator)[:times].tolist()
        rows += [NoisedRow(item, item_index, level, f"forward {epoch} {level}") for level in levels]
    return rows


@dataclass(frozen=True)
class NoisedBatch:
    """A micro-batch on the device; the samples of an item are neighbours."""

    noisy: Tensor
    """[R, ...]"""
    target: Tensor
    """[R, ...] the velocity of the way from sample to noise."""
    sigmas: Tensor
    """[R, 1, ...]"""
    timesteps: Tensor
    """[R]"""
    texts: tuple[str, ...]
    """R prompts."""
    guidance_scale: float
    item_index: Tensor
    """[U] of the item in the whole optimizer step."""

    @classmethod
    def from_rows(cls, rows: Sequence[NoisedRow], levels: NoiseLevels, device: torch.device) -> NoisedBatch:
        """The micro-batch of these rows; all are guided alike, for they are of one rollout."""
        samples = [(row, sample) for row in rows for sample in row.item.samples]  # R
        clean = to_device(torch.stack([sample.final for _, sample in samples]), device)  # [R, ...]
        drawn = [_noise(row) for row, _ in samples]
        noise = to_device(torch.stack(drawn), device)  # [R, ...]
        sigmas = broadcast_rows([levels.sigmas[row.level] for row, _ in samples], clean)
        return cls(
            noisy=(1 - sigmas) * clean + sigmas * noise,
            target=noise - clean,
            sigmas=sigmas,
            timesteps=torch.tensor([levels.timesteps[row.level] for row, _ in samples], device=device),
            texts=tuple(row.item.text for row, _ in samples),
            guidance_scale=rows[0].item.samples[0].guidance_scale,
            item_index=torch.tensor([row.item_index for row in rows], device=device),
        )


def _noise(row: NoisedRow) -> Tensor:
    first = row.item.samples[0]
    return seeded_noise(prompt_seed(first.seed, row.draw), 0, first.final.shape)
