"""Surrogate and KL estimators of denoising steps, whose policy draws from Gaussians: of diffusion models alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from longrl.algorithms.losses import TokenLosses, Tokens, clipped
from longrl.algorithms.needs import needs


@needs(rows="denoising steps")
def grpo_guard(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """`clipped` with the ratio and the weights of GRPO-Guard, arXiv:2510.22319: for denoising steps alone.

        rho = exp((log policy - log old policy + |mean - old mean|^2 / (2 std^2)) * std),    L = clipped(rho) / length

    The sampler's log-ratio has a mean below 0, lower at steps of small std, so that one clip range holds back bad
    samples and lets good ones run away. The added term centres it, and the factor gives all steps the same spread: what
    is left is the average of eps * (mean - old mean). Dividing by the step's length balances their gradients.

    Raises:
        ValueError: the rows are tokens.
    """
    steps = tokens.steps
    if steps is None:
        raise ValueError(
            "grpo_guard is for denoising steps, got tokens; set model.algorithm.surrogate to longrl.algorithms.clipped"
        )
    moved = (steps.mean - steps.old_mean).square().mean(-1) / (2 * steps.std.square())  # [R], with gradient
    centred = (tokens.logp - tokens.old_logp + moved) * steps.std
    result = clipped(tokens, clip_low, clip_high, centred.exp())
    return replace(result, loss=result.loss / steps.length)


@needs(rows="denoising steps")
def gaussian_mean(location: Tensor, ref_location: Tensor) -> Tensor:
    """KL between two Gaussians of the same deviation, per number of a latent: mean(((mu - mu_ref) / std)^2) / 2. [R].

    Flow-GRPO, arXiv:2505.05470, eq. 12, with the step's own variance below the squares, as its code has it for Wan (for
    SD3 see `gaussian_mean_rate`). The gradient is that of KL(policy || reference), exactly. For diffusion models alone.

    Args:
        location: [R, D] means divided by the deviation.
        ref_location: [R, D] of the reference, divided by the same.
    """
    return (location - ref_location).square().mean(-1) / 2


@needs(rows="denoising steps", noise_rate=True)
def gaussian_mean_rate(location: Tensor, ref_location: Tensor) -> Tensor:
    """`gaussian_mean` times the step's length in sigma: the KL term of Flow-GRPO's released code for SD3. [R].

    That code divides by the variance of the noise per unit of sigma, std^2 / length, so a short step counts for less.
    Over the 9 steps that train of SD3's 10 the mean of 1 / length is 13.02: where all of them add alike, the released
    coefficient 0.04 is 0.04 / 13.02 = 0.0031 of `gaussian_mean`. Of CPS that code takes `gaussian_mean`.

    Args:
        location: [R, D] means divided by std / sqrt(length).
        ref_location: [R, D] of the reference, divided by the same.
    """
    return gaussian_mean(location, ref_location)
