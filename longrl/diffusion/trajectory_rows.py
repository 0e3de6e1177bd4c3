"""Trajectories of an optimizer step as rows that a flow model scores, in micro-batches of any size.

Letters: P prompts, C samples of the step on this rank, N rows (pairs of a sample and a step of its window), R of a
micro-batch. The dots stand for the axes of a latent, D for all of its numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.diffusion.sampler import Trajectory
from longrl.diffusion.steps import log_prob, mean_of, per_row
from longrl.strategies.fsdp import RootModule


@dataclass(frozen=True)
class Place:
    """Which step a row is: `trajectory.steps[place]`."""

    trajectory: Trajectory
    place: int
    text: str
    row: int
    """Number of the row over the whole optimizer step."""
    sample: int
    """Number of its sample."""


def places_of(texts: Sequence[str], samples: Sequence[Sequence[Trajectory]]) -> list[Place]:
    """All rows of P prompts with G trajectories each, sample after sample."""
    flat = [(text, trajectory) for text, own in zip(texts, samples, strict=True) for trajectory in own]
    found = [
        (trajectory, place, text, sample)
        for sample, (text, trajectory) in enumerate(flat)
        for place in range(len(trajectory.steps))
    ]
    return [Place(trajectory, place, text, row, sample) for row, (trajectory, place, text, sample) in enumerate(found)]


def split(places: Sequence[Place], size: int) -> list[Sequence[Place]]:
    """Micro-batches of at most `size` rows, as equal as they can be."""
    count = -(-len(places) // size)
    edges = [len(places) * part // count for part in range(count + 1)] if count else []
    return [places[start:stop] for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Rows:
    """A micro-batch on the device."""

    latents: Tensor
    """[R, ...] states before the steps."""
    drawn: Tensor
    """[R, ...] states behind them."""
    old_mean: Tensor
    """[R, D] where the sampler's weights lead without noise."""
    timesteps: Tensor
    """[R]"""
    keep: Tensor
    """[R, 1, ...]"""
    move: Tensor
    """[R, 1, ...]"""
    std: Tensor
    """[R]"""
    length: Tensor
    """[R] how far sigma falls."""
    texts: tuple[str, ...]
    """R prompts."""
    guidance_scale: float
    row_index: Tensor
    """[R] number of the row over the whole optimizer step."""
    sample_index: Tensor
    """[R] number of its sample."""

    @classmethod
    def of(cls, places: Sequence[Place], device: torch.device) -> Rows:
        """The micro-batch of these rows; all are guided alike, for they are of one rollout."""
        steps = [item.trajectory.steps[item.place] for item in places]
        latents = torch.stack([item.trajectory.latents[item.place] for item in places]).to(device)

        def numbers(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            latents=latents,
            drawn=torch.stack([item.trajectory.latents[item.place + 1] for item in places]).to(device),
            old_mean=torch.stack([item.trajectory.old_mean(item.place).flatten() for item in places]).to(device),
            timesteps=numbers([step.timestep for step in steps]),
            keep=per_row([step.keep for step in steps], latents),
            move=per_row([step.move for step in steps], latents),
            std=numbers([step.std for step in steps]),
            length=numbers([step.length for step in steps]),
            texts=tuple(item.text for item in places),
            guidance_scale=places[0].trajectory.guidance_scale,
            row_index=numbers([item.row for item in places], torch.int64),
            sample_index=numbers([item.sample for item in places], torch.int64),
        )


@dataclass(frozen=True)
class Scores:
    """What a policy says of the rows of a micro-batch."""

    logp: Tensor
    """[R] log-probability of what was drawn, the mean over its numbers."""
    mean: Tensor
    """[R, D] where the policy leads without noise."""


def score(policy: RootModule, rows: Rows) -> Scores:
    """The rows under a policy, with gradient where it is wanted."""
    velocity = policy(rows.latents, rows.timesteps, rows.texts, rows.guidance_scale)  # [R, ...]
    mean = mean_of(rows.latents, velocity, rows.keep, rows.move)  # [R, ...]
    return Scores(log_prob(rows.drawn, mean, rows.std), mean.flatten(1))
