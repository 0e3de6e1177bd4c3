"""The rows of a micro-batch as surrogates and corrections read them, and sums over completions or ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms.kl import log_ratio

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks."""


def single_rank(values: Tensor) -> Tensor:
    """The `AllReduce` of one process."""
    return values


@dataclass(frozen=True)
class DrawnSteps:
    """What is known of rows that are denoising steps: what was drawn is a latent of D numbers around a mean.

    Log-probabilities of such rows are means over the D numbers (longrl/diffusion/steps.py).
    """

    mean: Tensor
    """[R, D] under the policy being updated, with gradient."""
    std: Tensor
    """[R] deviation of the noise."""
    length: Tensor
    """[R] how far sigma falls in the step."""
    old_mean: Tensor
    """[R, D] under the policy before the updates."""
    ref_mean: Tensor | None = None
    """[R, D] under the reference policy."""

    @property
    def moved(self) -> Tensor:
        """[R] mean((mean - old mean)^2) / (2 std^2), with gradient."""
        return (self.mean - self.old_mean).square().mean(-1) / (2 * self.std.square())

    @property
    def locations(self) -> tuple[Tensor, Tensor | None]:
        """[R, D] means in units of the deviation, of policy and reference: what `gaussian_mean` compares."""
        std = self.std[:, None]
        return self.mean / std, None if self.ref_mean is None else self.ref_mean / std


@dataclass(frozen=True)
class Tokens:
    """Scored completion tokens; every field is [R]. Only `logp` carries a gradient."""

    logp: Tensor
    """Under the policy being updated."""
    old_logp: Tensor
    """Under the policy before the updates on this rollout."""
    advantages: Tensor
    completion_index: Tensor
    """Which completion a row belongs to; all rows of a completion are here, in any order."""
    sampler_logp: Tensor | None = None
    """As the rollout engine reported it."""
    steps: DrawnSteps | None = None
    """Of a flow model's rows."""

    @property
    def log_ratio(self) -> Tensor:
        """Log of policy / old policy, within +-20."""
        return log_ratio(self.logp, self.old_logp)

    @property
    def ratio(self) -> Tensor:
        """Policy / old policy."""
        return self.log_ratio.exp()

    def completion_sum(self, values: Tensor) -> Tensor:
        """Each row gets the sum over the rows of its completion."""
        ids, place = torch.unique(self.completion_index, return_inverse=True)
        # float64: the order in which a GPU adds does not show after rounding
        sums = values.new_zeros(len(ids), dtype=torch.float64).index_add(0, place, values.double())
        return sums[place].to(values.dtype)

    def completion_mean(self, values: Tensor) -> Tensor:
        """Each row gets the mean over the rows of its completion."""
        return self.completion_sum(values) / self.completion_sum(torch.ones_like(values))
