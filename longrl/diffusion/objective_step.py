"""The micro-batches of an optimizer step under an objective on finished samples, and the losses of each.

Letters: U rows of a micro-batch, R of them and their samples, M items of the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrl.algorithms import LossOutput
from longrl.diffusion.noised_rows import Items, NoisedBatch, NoiseLevels, noised_rows
from longrl.diffusion.objectives import Objective, Velocities
from longrl.diffusion.sampler import Trajectory
from longrl.diffusion.trajectory_rows import split_rows
from longrl.io.pulse import PULSE
from longrl.modules.mini_batches import FlatGroups, MiniBatch
from longrl.types import TextPrompt

if TYPE_CHECKING:
    from longrl.diffusion.diffusion_module import DiffusionModule


def one_token_each(flat: FlatGroups[TextPrompt, Trajectory]) -> FlatGroups[TextPrompt, Trajectory]:
    """The groups of a rollout whose samples count as completions of one token, which nobody has a probability of."""
    num_generations = flat.rewards.shape[1]
    ones = torch.ones_like(flat.lengths)  # [C]
    return dataclasses.replace(
        flat,
        lengths=ones,
        sampler_logp=flat.rewards.new_zeros(len(ones)),
        staleness=torch.zeros_like(ones),
        num_stale=0,
        offsets=list(range(0, len(ones) + 1, num_generations)),
    )


def objective_losses(
    module: DiffusionModule, objective: Objective, mini_batch: MiniBatch[TextPrompt, Trajectory], epoch: int
) -> list[Callable[[], LossOutput]]:
    """The loss of each micro-batch, to be called in turn; every rank of the run must call it.

    Args:
        module: has policy, reference and old policy.
        objective: what is learned.
        mini_batch: of samples of one token each.
        epoch: number of the time that the rollout is gone through.
    """
    # 1. Rows of (item, sigma), and as many micro-batches as they need.
    items = objective.items(mini_batch, module.algorithm, module.parallel.dp)
    sigmas, timesteps = module.family.denoising_schedule(objective.num_times)
    levels = NoiseLevels(sigmas, timesteps)
    rows = noised_rows(items.items, len(timesteps), objective.times_per_sample, epoch)
    size = max(1, module.rows_per_micro_batch // objective.samples_per_row)
    make = [functools.partial(NoisedBatch.from_rows, part, levels, module.device) for part in split_rows(rows, size)]

    # 2. What the old policy says of all of them, at once: its weights take the place of the policy's meanwhile.
    old: list[Tensor | None] = [None] * len(make)
    if module.old_weights is not None:
        old = old_velocities(module, make)

    # 3. The losses.
    return [
        functools.partial(_loss, module, objective, items, made, velocity)
        for made, velocity in zip(make, old, strict=True)
    ]


@torch.no_grad()
def old_velocities(module: DiffusionModule, make: Sequence[Callable[[], NoisedBatch]]) -> list[Tensor | None]:
    """[R, ...] velocities of each micro-batch by the old policy; every rank of the run must call it.

    They stay on the device: 4 bytes for each value of a latent and row, for SD3.5 at 512 x 512 256 KiB a row.
    """
    num_missing = module.parallel.dp.max(len(make)) - len(make)
    velocities: list[Tensor | None] = []
    with module.sampling_weights():
        for made in make:
            PULSE.beats += 1
            batch = made()
            velocities.append(module.policy(batch.noisy, batch.timesteps, batch.texts, batch.guidance_scale))
        for _ in range(num_missing):
            module.policy(*module.idle_inputs())
    return velocities


def _loss(
    module: DiffusionModule,
    objective: Objective,
    items: Items,
    make: Callable[[], NoisedBatch],
    old: Tensor | None,
) -> LossOutput:
    """The weighted sum over a micro-batch, with metrics that add up likewise."""
    batch = make()
    inputs = (batch.noisy, batch.timesteps, batch.texts, batch.guidance_scale)
    reference = None if module.reference is None else module.reference_velocity(*inputs)
    velocity = module.policy(*inputs)
    result = objective.losses(Velocities(velocity, old, reference), batch, items.scores[batch.item_index])
    weights = items.weights[batch.item_index] / objective.times_per_sample  # [U]
    values = {**result.metrics, "weight_sum": torch.ones_like(weights)}
    sums = {name: (weights * value.detach()).sum() for name, value in values.items()}
    return LossOutput((weights * result.loss).sum(), sums)
