"""Draws samples of a flow model and keeps what is needed to score them again.

Letters: B samples drawn together, S steps of the schedule, W of them in the window. Latents are float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.diffusion.steps import Dynamics, FlowSDE, Step, log_prob, make_step, mean_of, ode
from longrl.diffusion.windows import Window, all_steps
from longrl.engines.rollout_engine import prompt_seed

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], timesteps [B]) -> [B, ...]."""


@dataclass(frozen=True)
class DiffusionSampling:
    """How samples are drawn.

    Example:
        `DiffusionSampling(num_generations=24, num_steps=10, guidance_scale=4.5)`; `window: null` in YAML is the plain ODE.
    """

    num_generations: int = 24
    """G, samples of a prompt."""
    num_steps: int = 10
    """Of the schedule; fewer than for final pictures do in training (Flow-GRPO: 10 for 40)."""
    guidance_scale: float = 4.5
    """Classifier-free guidance (arXiv:2207.12598), in sampling and in training, at the price of two forward passes;
    1 does without."""
    dynamics: Dynamics | None = None
    """How the steps of the window are taken: `FlowSDE` or `CPS` of longrl.diffusion.steps; None is `FlowSDE(0.7)`."""
    window: Window | None = all_steps
    """Which steps draw noise and are trained: longrl/diffusion/windows.py; null is none."""
    same_start: bool = False
    """All samples of a prompt begin with the same noise, so that they differ by the noise of the window alone
    (DanceGRPO, arXiv:2505.07818)."""

    def __post_init__(self) -> None:
        if self.num_generations < 1 or self.num_steps < 2:
            raise ValueError(
                "sampling.num_generations must be at least 1 and sampling.num_steps at least 2, "
                f"got {self.num_generations} and {self.num_steps}"
            )
        if self.guidance_scale < 1:
            raise ValueError(f"sampling.guidance_scale must be at least 1, which is none, got {self.guidance_scale}")

    def steps(self, sigmas: Sequence[float], timesteps: Sequence[float], rollout: int, seed: int) -> list[Step]:
        """The steps of a rollout, those of its window drawn and the others by the ODE."""
        dynamics = self.dynamics or FlowSDE()
        drawn: range | Sequence[int] = ()
        if self.window is not None:
            drawn = self.window(len(timesteps), rollout, seed)
            if any(later - index != 1 for index, later in itertools.pairwise(drawn)):
                raise ValueError(
                    f"a window must be neighbouring steps, got {list(drawn)}; set sampling.window of the "
                    "DiffusionRolloutCallback to one of longrl/diffusion/windows.py"
                )
        return [
            make_step(dynamics if index in drawn else ode, index, sigmas, timesteps) for index in range(len(timesteps))
        ]


@dataclass(frozen=True)
class Trajectory:
    """One sample: a completion whose tokens are the steps of the window."""

    latents: Tensor
    """[W + 1, ...] states before each step of the window, and behind the last."""
    logprobs: Tensor
    """[W] float32 of each step, under the policy that drew them."""
    steps: tuple[Step, ...]
    """The W steps."""
    final: Tensor
    """[...] what is decoded."""
    guidance_scale: float
    seed: int
    """Decides all noise of the sample."""
    decode: Callable[[Trajectory], Tensor] | None = field(default=None, compare=False, repr=False)
    """Gives its frames; latents are kept, for they are far smaller."""

    @property
    def frames(self) -> Tensor:
        """[F, 3, H, W] uint8, decoded on every call."""
        assert self.decode is not None, "a rollout says how its samples are decoded"
        return self.decode(self)

    def noise(self, place: int) -> Tensor:
        """[...] the eps that step `steps[place]` drew, made anew."""
        return noise_of(self.seed, self.steps[place].index + 1, self.final.shape)

    def old_mean(self, place: int) -> Tensor:
        """[...] where step `steps[place]` would have gone without noise."""
        return self.latents[place + 1] - self.steps[place].std * self.noise(place)


@dataclass
class Drawn:
    """What `draw` returns of B samples."""

    final: Tensor
    """[B, ...]"""
    latents: list[Tensor] = field(default_factory=list)
    """W + 1 tensors [B, ...]"""
    logprobs: list[Tensor] = field(default_factory=list)
    """W tensors [B]"""


def draw(velocity: Velocity, start: Tensor, steps: Sequence[Step], noise: Callable[[int], Tensor]) -> Drawn:
    """Walks B samples through a schedule.

    Args:
        velocity: the model with its prompts.
        start: [B, ...] float32 noise at the first sigma.
        steps: all steps; those with noise are neighbours.
        noise: place of a step -> [B, ...] noise for it; asked only where noise is drawn.
    """
    latents, found = start, Drawn(start)
    for step in steps:
        timesteps = torch.full((len(latents),), step.timestep, dtype=torch.float32, device=latents.device)
        mean = mean_of(latents, velocity(latents, timesteps), step.keep, step.move)
        if step.std:
            after = mean + step.std * noise(step.index)
            std = torch.full((len(latents),), step.std, device=latents.device)
            found.latents = [*(found.latents or [latents]), after]
            found.logprobs.append(log_prob(after, mean, std))
        else:
            after = mean
        latents = after
    found.final = latents
    return found


def draw_seeded(
    velocity: Velocity,
    shape: Sequence[int],
    steps: Sequence[Step],
    seeds: Sequence[int],
    guidance_scale: float,
    device: torch.device,
    start_seeds: Sequence[int] | None = None,
) -> list[Trajectory]:
    """One sample per seed, the same whatever other samples are drawn beside it but for rounding.

    Args:
        velocity: the model with a prompt for each seed.
        shape: of one latent.
        steps: as in `draw`.
        seeds: B numbers.
        guidance_scale: what `velocity` applies, for the record.
        device: of the latents; trajectories are kept in host memory.
        start_seeds: of the initial noise, if others.
    """

    def stacked(place: int, own: Sequence[int]) -> Tensor:
        return torch.stack([noise_of(seed, place, shape) for seed in own]).to(device)

    start = stacked(0, start_seeds or seeds)
    found = draw(velocity, start, steps, lambda index: stacked(index + 1, seeds))
    scored = tuple(step for step in steps if step.std)
    latents = torch.stack(found.latents, 1).cpu() if scored else found.final[:, None].cpu()
    logprobs = torch.stack(found.logprobs, 1).float().cpu() if scored else torch.zeros(len(seeds), 0)
    final = found.final.cpu()
    return [
        Trajectory(latents[row].clone(), logprobs[row].clone(), scored, final[row].clone(), guidance_scale, seed)
        for row, seed in enumerate(seeds)
    ]


def noise_of(seed: int, place: int, shape: Sequence[int]) -> Tensor:
    """Noise of a sample: place 0 is where it starts, place i + 1 is for step i. From the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(prompt_seed(seed, f"noise {place}"))
    return torch.randn(tuple(shape), generator=generator)
