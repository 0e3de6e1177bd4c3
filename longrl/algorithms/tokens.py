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
