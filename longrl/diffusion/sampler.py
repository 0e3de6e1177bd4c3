"""Draws samples of a diffusion model and keeps what is needed to score them again.

Letters: B samples drawn together, S steps of the schedule, W of them in the window. Latents are float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.diffusion.steps import DenoisingStep, Dynamics, FlowSDE, make_step, ode_step, step_log_prob, step_mean
from longrl.diffusion.windows import Window, all_steps
from longrl.engines.rollout_engine import prompt_seed
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.pulse import PULSE

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, ...], timesteps [B]) -> [B, ...]."""
VelocityPolicy = Callable[[Tensor, Tensor, Sequence[str], float], Tensor]
"""(latents [R, ...], timesteps [R], R prompts, guidance scale) -> velocities [R, ...]."""


@dataclass(frozen=True)
class DiffusionSampling:
    """How samples are drawn.

    Example:
        `DiffusionSampling(num_generations=24, num_steps=10, guidance_scale=4.5)`; `window: null` in YAML is the plain
        ODE.
    """

    num_generations: int = 24
    """G, samples of a prompt."""
    num_steps: int = 10
    """S of the schedule; fewer than for final pictures do in training (Flow-GRPO: 10 for 40)."""
    guidance_scale: float = 4.5
    """Classifier-free guidance (arXiv:2207.12598), in sampling and in training, at the price of two forward passes;
    1 does without."""
    dynamics: FunctionOrPath[Dynamics] | None = None
    """How the steps of the window are taken: `FlowSDE` or `CPS` of longrl.diffusion.steps; None is `FlowSDE(0.7)`."""
    window: FunctionOrPath[Window] | None = all_steps
    """Which steps draw noise and are trained: longrl/diffusion/windows.py; null is none."""
    same_start: bool = False
    """All samples of a prompt begin with the same noise, so that they differ by the noise of the window alone
    (DanceGRPO, arXiv:2505.07818)."""

    def __post_init__(self) -> None:
        called_with = {"dynamics": ("sigma", "next_sigma"), "window": ("num_steps", "rollout", "seed")}
        for name, arguments in called_with.items():
            if getattr(self, name) is not None:
                function = resolve_function(getattr(self, name), f"rollout.sampling.{name}", arguments)
                object.__setattr__(self, name, function)
        if self.num_generations < 1 or self.num_steps < 2:
            raise ValueError(
                "sampling.num_generations must be at least 1 and sampling.num_steps at least 2, "
                f"got {self.num_generations} and {self.num_steps}"
            )
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"sampling.guidance_scale must be at least 1, which is none, got {self.guidance_scale}")

    def steps(
        self, sigmas: Sequence[float], timesteps: Sequence[float], rollout: int, seed: int
    ) -> list[DenoisingStep]:
        """The steps of a rollout, those of its window drawn and the others by the ODE."""
        dynamics = self.dynamics or FlowSDE()
        window: Sequence[int] = ()
        if self.window is not None:
            window = self.window(len(timesteps), rollout, seed)
            if any(later - index != 1 for index, later in itertools.pairwise(window)):
                raise ValueError(
                    f"a window must be neighbouring steps, got {list(window)}; set rollout.sampling.window to one of "
                    "longrl/diffusion/windows.py"
                )
        return [
            make_step(dynamics if index in window else ode_step, index, sigmas, timesteps)
            for index in range(len(timesteps))
        ]


@dataclass(frozen=True)
class Trajectory:
    """One sample: a completion whose tokens are the steps of the window."""

    latents: Tensor
    """[W + 1, ...] states before each step of the window, and behind the last."""
    logprobs: Tensor
    """[W] float32 of each step, under the policy that drew them."""
    steps: tuple[DenoisingStep, ...]
    """The W steps."""
    final: Tensor
    """[...] what is decoded; pictures are far larger and made of it when they are needed."""
    guidance_scale: float
    seed: int
    """Decides all noise of the sample."""

    def old_mean(self, index: int) -> Tensor:
        """[...] the state behind `steps[index]` without its noise, which is drawn anew from the seed."""
        step = self.steps[index]
        noise = seeded_noise(self.seed, step.index + 1, self.final.shape)
        return self.latents[index + 1] - step.std * noise


@dataclass
class DenoisedLatents:
    """The states of B samples on their way through a schedule."""

    final: Tensor
    """[B, ...]"""
    latents: list[Tensor] = field(default_factory=list)
    """W + 1 tensors [B, ...]"""
    logprobs: list[Tensor] = field(default_factory=list)
    """W tensors [B]"""


def denoise_latents(
    velocity: Velocity, start: Tensor, steps: Sequence[DenoisingStep], noise: Callable[[int], Tensor]
) -> DenoisedLatents:
    """Takes B samples through a schedule.

    Args:
        velocity: the model with its prompts.
        start: [B, ...] float32 noise at the first sigma.
        steps: all steps; those with noise are neighbours.
        noise: index of a step -> [B, ...] noise for it; called only where noise is drawn.
    """
    state = start  # [B, ...]
    denoised = DenoisedLatents(start)
    for step in steps:
        PULSE.beats += 1
        timesteps = torch.full((len(state),), step.timestep, dtype=torch.float32, device=state.device)
        mean = step_mean(state, velocity(state, timesteps), step.state_coef, step.velocity_coef)
        if not step.std:
            state = mean
            continue
        if not denoised.latents:
            denoised.latents.append(state)
        state = mean + step.std * noise(step.index)
        std = torch.full((len(state),), step.std, device=state.device)
        denoised.latents.append(state)
        denoised.logprobs.append(step_log_prob(state, mean, std))
    denoised.final = state
    return denoised


def sample_trajectories(
    policy: VelocityPolicy,
    texts: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[DenoisingStep],
    *,
    shape: Sequence[int],
    guidance_scale: float = 1.0,
    device: torch.device,
    start_seeds: Sequence[int] | None = None,
) -> list[Trajectory]:
    """One sample per seed, the same whatever other samples are drawn beside it but for rounding.

    Args:
        policy: the model.
        texts: B prompts.
        seeds: B of them.
        steps: as in `denoise_latents`.
        shape: of one latent.
        guidance_scale: of classifier-free guidance; 1 is none.
        device: of the latents; trajectories are kept in host memory.
        start_seeds: of the initial noise, if others.
    """

    def stacked_noise(index: int, seeds: Sequence[int]) -> Tensor:  # [B, ...]
        return torch.stack([seeded_noise(seed, index, shape) for seed in seeds]).to(device)

    denoised = denoise_latents(
        lambda latents, timesteps: policy(latents, timesteps, texts, guidance_scale),
        stacked_noise(0, start_seeds or seeds),
        steps,
        lambda index: stacked_noise(index + 1, seeds),
    )
    final = denoised.final.cpu()
    latents = final[:, None]  # [B, W + 1, ...]
    logprobs = torch.zeros(len(seeds), 0)  # [B, W]
    scored = tuple(step for step in steps if step.std)
    if scored:
        latents = torch.stack(denoised.latents, 1).cpu()
        logprobs = torch.stack(denoised.logprobs, 1).float().cpu()
    return [
        Trajectory(latents[row].clone(), logprobs[row].clone(), scored, final[row].clone(), guidance_scale, seed)
        for row, seed in enumerate(seeds)
    ]


def seeded_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Noise of a sample: 0 is where it starts, i + 1 is for step i. From the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(prompt_seed(seed, f"noise {index}"))
    return torch.randn(tuple(shape), generator=generator)
