"""Estimates of KL(policy || reference) from one sampled token, by the names of Schulman's note.

http://joschu.net/blog/kl-approx.html, with x = log policy(token) - log reference(token) and the token drawn from the
policy: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. k1 and k3 are unbiased. As a term of the LOSS only the gradient
counts, and that orders them differently; each function says what its gradient is.

`gaussian_mean` is no estimate: where policy and reference are Gaussians of the same deviation, as in a denoising step,
their distance is known.
"""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20, so that exp stays finite; beyond it the gradient is zero."""


def log_ratio(logp: Tensor, other_logp: Tensor) -> Tensor:
    """`logp - other_logp` within +-20; shapes [R]."""
    return (logp - other_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1 = x = logp - ref_logp, [R]; unbiased, may be negative. For `kl_placement: reward`.

    In the loss it does nothing: its gradient is that of logp, whose expectation under the policy is zero.
    """
    return log_ratio(logp, ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2 = x^2 / 2 with x = logp - ref_logp, [R]; biased, but the right one to differentiate.

    Its gradient, x * grad logp, is in expectation that of KL(policy || reference): what REINFORCE++-baseline takes
    (arXiv:2501.03262), and what verl and others put behind the value of k3 as "k3+".
    """
    return log_ratio(logp, ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = exp(-x) - 1 + x with x = logp - ref_logp, [R]; unbiased and never negative (GRPO, arXiv:2402.03300, eq. 4).

    Its gradient, (1 - exp(-x)) * grad logp, is in expectation that of the other direction, KL(reference || policy).
    """
    difference = log_ratio(logp, ref_logp)
    return (-difference).exp() - 1 + difference


def gaussian_mean(location: Tensor, ref_location: Tensor) -> Tensor:
    """KL between two Gaussians of the same deviation, per number of a latent: mean(((mu - mu_ref) / std)^2) / 2. [R].

    Flow-GRPO, arXiv:2505.05470, eq. 12, with the step's own variance below the squares (its code leaves out the length
    of the step). The gradient is that of KL(policy || reference), exactly. For flow models alone.

    Args:
        location: [R, D] means divided by the deviation.
        ref_location: [R, D] of the reference, divided by the same.
    """
    return (location - ref_location).square().mean(-1) / 2
