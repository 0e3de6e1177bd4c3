"""Attention of packed groups and its gradients in float64, tile by tile: the oracle where [L, L] does not fit.

It shares nothing with the code it judges: which keys a query may see follows from labels of the tokens, as a mask of
each tile; softmax by its maximum and its sum, not by a log-sum-exp; gradients by their formulas. Two passes over the
tiles, the second with the row statistics of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.types import GroupSpan


@dataclass(frozen=True)
class Labels:
    """[L] group of each token, and its completion: 0 for the prompt's; -1 outside every group."""

    group: Tensor
    completion: Tensor

    @classmethod
    def of(cls, spans: Sequence[GroupSpan], length: int, device: torch.device) -> Labels:
        group, completion = torch.full((2, length), -1, device=device)
        for number, span in enumerate(spans):
            group[span.start : span.stop] = number
            counts = torch.tensor([span.prompt_tokens, *span.completion_tokens], device=device)
            numbers = torch.arange(len(counts), device=device)
            completion[span.start : span.stop] = numbers.repeat_interleave(counts)
        return cls(group, completion)

    def mask(self, rows: range, keys: range) -> Tensor:
        """[rows, keys] True where a query may see a key."""
        places = torch.arange(max(rows.stop, keys.stop), device=self.group.device)
        row, key = places[rows.start : rows.stop, None], places[None, keys.start : keys.stop]
        group = self.group[row]
        same = (group == self.group[key]) & (group >= 0)
        own = (self.completion[row] == self.completion[key]) | (self.completion[key] == 0)
        return same & own & (key <= row)


def attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, spans: Sequence[GroupSpan], scale: float,
    tile: int = 2048,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Output [H, L, D] and gradients of query [H, L, D], key and value [K, L, D], in float64 where these lie."""
    repeat, labels = query.shape[0] // key.shape[0], Labels.of(spans, query.shape[1], query.device)
    query, grad_output = query.detach().double(), grad_output.double()
    keys, values = (x.detach().double().repeat_interleave(repeat, 0) for x in (key, value))
    largest = query.new_full(query.shape[:-1], -1e300)
    total, output = torch.zeros_like(largest), torch.zeros_like(query)
    for rows, places, scores in _tiles(query, keys, labels, scale, tile):
        new = torch.maximum(largest[:, rows], scores.amax(-1))
        shrink, weights = torch.exp(largest[:, rows] - new), torch.exp(scores - new[..., None])
        total[:, rows] = total[:, rows] * shrink + weights.sum(-1)
        output[:, rows] = output[:, rows] * shrink[..., None] + weights @ values[:, places]
        largest[:, rows] = new
    output = torch.where(total[..., None] > 0, output / total[..., None], 0.0)
    grads = [torch.zeros_like(x) for x in (query, keys, values)]
    delta = (grad_output * output).sum(-1)
    for rows, places, scores in _tiles(query, keys, labels, scale, tile):
        probs = torch.exp(scores - largest[:, rows, None]) / total[:, rows, None].clamp_min(1e-300)
        of_scores = probs * (grad_output[:, rows] @ values[:, places].mT - delta[:, rows, None]) * scale
        grads[0][:, rows] += of_scores @ keys[:, places]
        grads[1][:, places] += of_scores.mT @ query[:, rows]
        grads[2][:, places] += probs.mT @ grad_output[:, rows]
    return output, (grads[0], *(grad.unflatten(0, (-1, repeat)).sum(1) for grad in grads[1:]))


def _tiles(
    query: Tensor, key: Tensor, labels: Labels, scale: float, tile: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, keys, scores [H, rows, keys] with -inf where masked) of every tile in which anything is seen."""
    length = query.shape[1]
    for row in range(0, length, tile):
        rows = range(row, min(row + tile, length))
        for place in range(0, rows.stop, tile):
            keys = range(place, min(place + tile, length))
            mask = labels.mask(rows, keys)
            if mask.any():
                here, there = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
                scores = (query[:, here] @ key[:, there].mT) * scale
                yield here, there, scores.masked_fill_(~mask, float("-inf"))
