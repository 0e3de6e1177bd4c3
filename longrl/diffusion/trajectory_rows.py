"""Trajectories of an optimizer step as rows that a diffusion model scores, in micro-batches of any size.

Letters: P prompts, G samples of each, C = P * G, N rows (pairs of a sample and a step of its window), R of a
micro-batch. The dots stand for the axes of a latent, D for all of its values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from longrl.diffusion.sampler import Trajectory, VelocityPolicy
from longrl.diffusion.steps import broadcast_rows, step_log_prob, step_mean
from longrl.modules.mini_batches import MiniBatch
from longrl.modules.skipped_steps import StepRecord
from longrl.types import Group, TextPrompt

TrajectoryGroup = Group[TextPrompt, Trajectory]
"""G samples of a prompt."""
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class TrajectoryRow:
    """One step of one sample: `trajectory.steps[step_index]`."""

    trajectory: Trajectory
    step_index: int
    text: str
    row_index: int
    """Number of the row in the whole optimizer step."""
    sample_index: int
    """Number of its sample there."""


def trajectory_rows(groups: Sequence[TrajectoryGroup]) -> list[TrajectoryRow]:
    """All N rows of P groups, sample after sample."""
    samples = [(group.prompt.row.problem, trajectory) for group in groups for trajectory in group.completions]
    rows: list[TrajectoryRow] = []
    for sample_index, (text, trajectory) in enumerate(samples):
        for step_index in range(len(trajectory.steps)):
            rows.append(TrajectoryRow(trajectory, step_index, text, len(rows), sample_index))
    return rows


def trajectory_record(mini_batch: MiniBatch[TextPrompt, Trajectory]) -> StepRecord:
    """The record of an optimizer step on samples; prompts are rows, steps and seeds facts."""
    tensors = mini_batch.tensors()
    samples = [trajectory for group in mini_batch.groups for trajectory in group.completions]
    for number, trajectory in enumerate(samples):
        tensors[f"latents.{number}"] = trajectory.latents
    facts: dict[str, Any] = {"seeds": [trajectory.seed for trajectory in samples]}
    if samples:
        facts["guidance_scale"] = samples[0].guidance_scale
        facts["steps"] = [dataclasses.asdict(step) for step in samples[0].steps]
    return StepRecord([group.prompt.row for group in mini_batch.groups], tensors, facts)


def split_rows(rows: Sequence[RowT], size: int) -> list[Sequence[RowT]]:
    """Micro-batches of at most `size` rows, as equal as they can be."""
    if not rows:
        return []
    count = -(-len(rows) // size)
    edges = [len(rows) * index // count for index in range(count + 1)]
    return [rows[start:stop] for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True)
class RowBatch:
    """A micro-batch on the device."""

    latents: Tensor
    """[R, ...] states before the steps."""
    drawn: Tensor
    """[R, ...] states behind them."""
    old_mean: Tensor
    """[R, D] states behind them without noise, by the weights that sampled."""
    timesteps: Tensor
    """[R]"""
    state_coef: Tensor
    """[R, 1, ...]"""
    velocity_coef: Tensor
    """[R, 1, ...]"""
    std: Tensor
    """[R]"""
    length: Tensor
    """[R] how far sigma falls."""
    texts: tuple[str, ...]
    """R prompts."""
    guidance_scale: float
    row_index: Tensor
    """[R] of the row in the whole optimizer step."""
    sample_index: Tensor
    """[R] of its sample there."""

    @classmethod
    def from_rows(cls, rows: Sequence[TrajectoryRow], device: torch.device) -> RowBatch:
        """The micro-batch of these rows; all are guided alike, for they are of one rollout."""
        steps = [row.trajectory.steps[row.step_index] for row in rows]
        latents = torch.stack([row.trajectory.latents[row.step_index] for row in rows]).to(device)
        return cls(
            latents=latents,
            drawn=torch.stack([row.trajectory.latents[row.step_index + 1] for row in rows]).to(device),
            old_mean=torch.stack([row.trajectory.old_mean(row.step_index).flatten() for row in rows]).to(device),
            timesteps=torch.tensor([step.timestep for step in steps], device=device),
            state_coef=broadcast_rows([step.state_coef for step in steps], latents),
            velocity_coef=broadcast_rows([step.velocity_coef for step in steps], latents),
            std=torch.tensor([step.std for step in steps], device=device),
            length=torch.tensor([step.length for step in steps], device=device),
            texts=tuple(row.text for row in rows),
            guidance_scale=rows[0].trajectory.guidance_scale,
            row_index=torch.tensor([row.row_index for row in rows], device=device),
            sample_index=torch.tensor([row.sample_index for row in rows], device=device),
        )


@dataclass(frozen=True)
class RowScores:
    """Scores of the rows of a micro-batch by a policy."""

    logp: Tensor
    """[R] log-probability of what was drawn, the mean over its values."""
    mean: Tensor
    """[R, D] states behind the steps without noise."""


def score_rows(policy: VelocityPolicy, rows: RowBatch) -> RowScores:
    """The rows of a micro-batch under a policy, with gradient where it is on."""
    velocity = policy(rows.latents, rows.timesteps, rows.texts, rows.guidance_scale)
    mean = step_mean(rows.latents, velocity, rows.state_coef, rows.velocity_coef)  # [R, ...]
    return RowScores(step_log_prob(rows.drawn, mean, rows.std), mean.flatten(1))
