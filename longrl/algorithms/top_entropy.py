"""The tokens of highest entropy of an optimizer step, over all ranks. Letters: N tokens of this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms.losses import AllReduce, single_rank


@dataclass(frozen=True)
class HighEntropy:
    """The tokens that get the policy gradient."""

    chosen: Tensor
    """[N] bool."""
    threshold: Tensor
    """[] the lowest entropy among them in nats, the same on all ranks; 0 without tokens."""


def high_entropy(entropies: Tensor, counted: Tensor, share: float, all_reduce: AllReduce = single_rank) -> HighEntropy:
    """The floor(share * (n - 1)) + 1 of n tokens whose entropy is highest; with ties, all of the lowest.

    arXiv:2506.01939: tokens at which the policy decides learn, and the 80% that follow from the words before
    them do not. n counts the tokens of one optimizer step on all ranks. As many as TRL keeps (`top_entropy_quantile`)
    of its micro-batch on all ranks; ms-swift takes those of each micro-batch on each rank.

    Args:
        entropies: [N] float32 in nats, of the policy before the updates.
        counted: [N] bool, tokens that have a weight.
        share: above 0, at most 1.
        all_reduce: sums over the data-parallel ranks; every rank must call it.
    """
    entropies = entropies.float().nan_to_num(0.0).clamp(min=0.0)
    total = all_reduce(counted.double().sum())
    wanted = (share * (total - 1).clamp(min=0)).floor() + 1
    threshold = _kth_largest(entropies, counted, wanted, all_reduce)
    threshold = threshold.where(total > 0, 0.0)
    return HighEntropy(counted & (entropies >= threshold), threshold)


def _kth_largest(values: Tensor, counted: Tensor, k: Tensor, all_reduce: AllReduce) -> Tensor:
    """[] exactly the k-th largest of float32 values at or above 0 on all ranks, by their bits, eight at a time.

    The order of such floats is that of their bits as integers. Sums of 256 counts are all that ranks exchange.
    """
    bits = values.contiguous().view(torch.int32).long()  # [N]
    leading = torch.zeros((), dtype=torch.int64, device=values.device)  # bits of the k-th largest that are known
    for shift in (24, 16, 8, 0):
        candidates = counted & (bits >> (shift + 8) == leading)
        digits = (bits >> shift) & 255
        none = torch.zeros(256, dtype=torch.float64, device=values.device)
        counts = all_reduce(none.index_add(0, digits, candidates.double()))
        at_or_above = counts.flip(0).cumsum(0).flip(0)  # [256] candidates with this digit or a higher one
        digit = (at_or_above >= k).sum() - 1
        digit = digit.clamp(min=0)
        k = k - (at_or_above - counts).gather(0, digit[None])[0]
        leading = leading * 256 + digit
    return leading.to(torch.int32).view(torch.float32)
