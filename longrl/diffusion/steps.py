"""One denoising step as a Gaussian policy, and the log-probability of what it drew.

A rectified flow mixes x_s = (1 - s) * data + s * noise, with s, `sigma`, going from 1 to 0; its model tells the
velocity v = noise - data. So it predicts both ends, data = x - s v and noise = x + (1 - s) v, and every way of stepping
from s to the next sigma n is

    x' = state_coef * x + velocity_coef * v + std * eps,    eps ~ N(0, 1)

with three coefficients that depend on s and n alone. std = 0 is the ordinary differential equation (ODE); the others
give each x' a density, which is what a policy gradient needs.

Letters: R rows (pairs of a sample and a step), the dots stand for the axes of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenoisingStep:
    """How one step is taken; plain numbers, so that the sampler and the trainer compute the same."""

    index: int
    """Number of the step in the schedule."""
    timestep: float
    """The model's input for sigma, sigma * 1000 for the models released so far."""
    sigma: float
    next_sigma: float
    state_coef: float
    velocity_coef: float
    std: float
    """Standard deviation of the noise; 0 for a step that draws none."""

    @property
    def length(self) -> float:
        """How far sigma falls, above 0."""
        return self.sigma - self.next_sigma

    @property
    def gain(self) -> float:
        """Deviations by which the mean moves if the velocity changes by 1; log-ratios grow with it, KL with its square.

        Of FlowSDE(0.7) it is below 2 in every schedule in use.
        """
        return abs(self.velocity_coef) / self.std if self.std else 0.0


# Any stands for the tuple: jsonargparse takes a class that a function returns for the class to make.
Dynamics = Callable[[float, float], Any]
"""(sigma, next sigma) -> (state_coef, velocity_coef, std)."""


def ode_step(sigma: float, next_sigma: float) -> tuple[float, float, float]:
    """Euler's step of the ODE, x' = x + (n - s) v: diffusers' `FlowMatchEulerDiscreteScheduler`."""
    return 1.0, next_sigma - sigma, 0.0


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's stochastic step, arXiv:2505.05470, eq. 9, with g = noise_level * sqrt(s / (1 - s)) and d = n - s < 0.

        mean = x (1 + g^2 / (2 s) d) + v (1 + g^2 (1 - s) / (2 s)) d,    std = g sqrt(-d)

    The reverse-time equation has the ODE's densities at every sigma whatever g is: g only says how much noise is put in
    and taken out again. Steps must be short: a long one leaves more noise behind than the model expects.
    At s = 1 the paper's g is infinite; as in its code, 1 - s is there the 1 - n of the step's end.
    """

    noise_level: float = 0.7
    """The paper's a; 0 is the ODE."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level < math.inf:
            raise ValueError(f"noise_level of FlowSDE must be at least 0, got {self.noise_level}; the paper has 0.7")

    def __call__(self, sigma: float, next_sigma: float) -> tuple[float, float, float]:
        """(state_coef, velocity_coef, std) of the step."""
        delta = next_sigma - sigma
        from_data = 1 - sigma if sigma < 1 else 1 - next_sigma
        variance_rate = self.noise_level**2 * sigma / from_data
        state_coef = 1 + variance_rate / (2 * sigma) * delta
        velocity_coef = (1 + variance_rate * (1 - sigma) / (2 * sigma)) * delta
        return state_coef, velocity_coef, math.sqrt(variance_rate * -delta)


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling, arXiv:2509.05952: part of the predicted noise is drawn anew.

        mean = (1 - n) data + n cos(h pi / 2) noise,    std = n sin(h pi / 2)

    with data and noise as predicted at s. x' has just the noise that the model expects at n, however long the step. Its
    densities are the ODE's where the data can be told from x, but else too narrow, more so with more steps: `data` is a
    mean, and the noise drawn does not shrink with the step.

    Late steps are not to be trained: std falls with n, how far the mean moves with s, so the last step of SD3's
    schedule, from 0.278 to 0.009, is 32 deviations long (FlowSDE: 1.5). Its ratios leave any clip range at once, its KL
    outweighs that of all others, and nobody sees the noise. The released recipes train 3 steps of the first 5 of 10.
    Their code leaves the factor 1 / (2 std^2) out of CPS's log-probabilities; log-ratios are larger here by it, 0.6 in
    the first step, 1.1 in the fifth, and their clip range of 1e-5 is to be multiplied by it.
    """

    noise_level: float = 0.8
    """The paper's h, from 0 (the ODE) to 1 (all noise is new)."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"noise_level of CPS must be between 0 and 1, got {self.noise_level}; 0.8 is usual")

    def __call__(self, sigma: float, next_sigma: float) -> tuple[float, float, float]:
        """(state_coef, velocity_coef, std) of the step."""
        if not self.noise_level:
            return ode_step(sigma, next_sigma)
        angle = self.noise_level * math.pi / 2
        old_noise = next_sigma * math.cos(angle)
        state_coef = (1 - next_sigma) + old_noise
        velocity_coef = old_noise * (1 - sigma) - (1 - next_sigma) * sigma
        return state_coef, velocity_coef, next_sigma * math.sin(angle)


def make_step(
    dynamics: Dynamics, index: int, sigmas: Tensor | Sequence[float], timesteps: Tensor | Sequence[float]
) -> DenoisingStep:
    """The step from `sigmas[index]` to the next."""
    sigma = float(sigmas[index])
    next_sigma = float(sigmas[index + 1])
    return DenoisingStep(index, float(timesteps[index]), sigma, next_sigma, *dynamics(sigma, next_sigma))


def broadcast_rows(values: Sequence[float], like: Tensor) -> Tensor:
    """[R] values as [R, 1, ...], to be multiplied with `like` [R, ...]."""
    column = torch.tensor(values, dtype=like.dtype, device=like.device)
    return column.view(-1, *[1] * (like.dim() - 1))


def step_mean(latents: Tensor, velocity: Tensor, state_coef: Tensor | float, velocity_coef: Tensor | float) -> Tensor:
    """[R, ...] states behind a step without its noise."""
    return latents * state_coef + velocity * velocity_coef


def step_log_prob(drawn: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[R] log-density of N(mean, std^2) at `drawn`, the MEAN over the latent's values (Flow-GRPO's code, not a sum).

    Of a latent of thousands of values the sum would make every ratio 0 or infinite; clip ranges of 1e-5 to 1e-3 are
    meant for the mean.

    Args:
        drawn: [R, ...].
        mean: [R, ...].
        std: [R].
    """
    scaled = (drawn - mean) / std.view(-1, *[1] * (mean.dim() - 1))
    return -(scaled.square().flatten(1).mean(1) / 2 + std.log() + math.log(2 * math.pi) / 2)
