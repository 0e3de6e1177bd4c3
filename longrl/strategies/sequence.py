"""Sequence parallelism: the ranks of a group hold neighbouring rows of one packed sequence (MR-SP, arXiv:2507.07966).

Everything but attention works row by row. In attention one all-to-all gives each rank all rows of some heads, and a
second one brings the rows back (DeepSpeed Ulysses, arXiv:2309.14509); in between, attention is what it is on one rank.
All collectives are exact under autograd: gradients are those of the whole sequence, each rank holding the part that
flowed through its rows.

Letters: L packed rows, a multiple of the group's size; H query heads, K key heads, E = H / K; D head or hidden size;
R scored rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import to_device


@dataclass(frozen=True)
class HeadLayout:
    """How heads are scattered over ranks, whatever their numbers.

    A key head with its E query heads is cut into `parts` equal parts of `size` queries, the last ones padded with
    zeros; a rank gets `per_rank` neighbouring parts, each with a copy of its key head. No key head is sent to a rank
    that does not need it, and none is repeated per query head.

    Example:
        28 query and 4 key heads on 8 ranks: 2 parts of 4 queries per key head, one part on each rank; 4 of 32 query
        heads are padding.
    """

    num_heads: int
    num_key_heads: int
    ranks: int
    parts: int
    size: int
    per_rank: int

    @classmethod
    def make(cls, num_heads: int, num_key_heads: int, ranks: int) -> HeadLayout:
        """The layout with the fewest query heads per rank, and among those the one with the fewest copies of keys."""
        queries = num_heads // num_key_heads
        layouts = [
            cls(num_heads, num_key_heads, ranks, parts, -(-queries // parts), -(-num_key_heads * parts // ranks))
            for parts in range(1, queries + 1)
        ]
        return min(layouts, key=lambda layout: (layout.per_rank * layout.size, layout.parts))

    def scatter(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[H, l, D], [K, l, D], [K, l, D] -> [ranks * per_rank, size + 2, l, D]: queries, then key and value."""
        num_rows, width = query.shape[1:]
        num_parts = self.num_key_heads * self.parts
        queries = query.reshape(self.num_key_heads, -1, num_rows, width)  # [K, E, l, D]
        missing = self.parts * self.size - queries.shape[1]
        queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, missing))
        queries = queries.reshape(num_parts, self.size, num_rows, width)
        keys = key.repeat_interleave(self.parts, 0)[:, None]  # [parts, 1, l, D]
        values = value.repeat_interleave(self.parts, 0)[:, None]
        scattered = torch.cat([queries, keys, values], 1)
        missing = self.ranks * self.per_rank - num_parts
        return torch.nn.functional.pad(scattered, (0, 0, 0, 0, 0, 0, 0, missing))

    def gather(self, output: Tensor) -> Tensor:
        """[ranks * per_rank, size, l, D] -> [H, l, D], padding dropped."""
        num_rows, width = output.shape[2:]
        output = output[: self.num_key_heads * self.parts].reshape(self.num_key_heads, -1, num_rows, width)
        return output[:, : self.num_heads // self.num_key_heads].reshape(self.num_heads, num_rows, width)


class SequenceParallel:
    """One rank's part of a packed sequence. On an axis of one rank every method hands its input through.

    Args:
        axis: the ranks that share the sequence.
    """

    def __init__(self, axis: Axis = SINGLE_RANK) -> None:
        self.axis = axis
        self.size = axis.size
        """Ranks that share a sequence."""

    def rows(self, length: int) -> slice:
        """This rank's rows of a sequence whose length is a multiple of the group's size."""
        num_rows = length // self.size
        return slice(self.axis.rank * num_rows, (self.axis.rank + 1) * num_rows)

    # -- attention -----------------------------------------------------------------------------------------------

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, HeadLayout]:
        """This rank's rows of all heads -> all rows of this rank's heads.

        Args:
            query: [H, L / ranks, D].
            key: [K, L / ranks, D].
            value: [K, L / ranks, D].

        Returns:
            [heads, L, D], [key heads, L, D] and [key heads, L, D] of this rank, and the layout for the way back.
        """
        layout = HeadLayout.make(len(query), len(key), self.size)
        scattered = layout.scatter(query, key, value)  # [ranks * per_rank, size + 2, l, D]
        num_rows, width = scattered.shape[2:]
        received = self._all_to_all(scattered)
        received = received.view(self.size, layout.per_rank, layout.size + 2, num_rows, width)
        # Rows of all ranks one after the other: [per_rank, size + 2, L, D].
        full = received.permute(1, 2, 0, 3, 4)
        full = full.reshape(layout.per_rank, layout.size + 2, self.size * num_rows, width)
        return full[:, :-2].flatten(0, 1), full[:, -2], full[:, -1], layout

    def local_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's heads of what all ranks have alike, as weights: `to_heads` without an exchange.

        Args:
            query: [H, rows, D].
            key: [K, rows, D].
            value: [K, rows, D].

        Returns:
            [heads, rows, D], [key heads, rows, D] and [key heads, rows, D] of this rank.
        """
        layout = HeadLayout.make(len(query), len(key), self.size)
        scattered = layout.scatter(query, key, value).unflatten(0, (self.size, -1))
        local = scattered[self.axis.rank]  # [per_rank, size + 2, rows, D]
        return local[:, :-2].flatten(0, 1), local[:, -2], local[:, -1]

    def to_rows(self, output: Tensor, layout: HeadLayout) -> Tensor:
        """[heads of this rank, L, D] -> [H, L / ranks, D]: the way back."""
        length, width = output.shape[1:]
        by_rank = output.view(layout.per_rank, layout.size, self.size, length // self.size, width)
        sent = by_rank.permute(2, 0, 1, 3, 4).flatten(0, 1)  # [ranks * per_rank, size, l, D]
        return layout.gather(self._all_to_all(sent))

    def _all_to_all(self, tensor: Tensor) -> Tensor:
        counts = [len(tensor) // self.size] * self.size
        return _AllToAll.apply(tensor, self.axis.group, counts, counts)

    # -- scored rows ---------------------------------------------------------------------------------------------

    def share(self, count: int) -> slice:
        """Which of `count` scored rows this rank scores: equal shares, wherever the rows lie."""
        rank = self.axis.rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def _edges(self, count: int) -> list[int]:
        return [count * rank // self.size for rank in range(self.size + 1)]

    def scored(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hidden states at the positions of this rank's share of the scored rows.

        Completions lie at the end of a sequence, on the last ranks; without the exchange those alone would do the work
        of the LM head.

        Args:
            hidden: [L / ranks, D] this rank's rows.
            positions: [R] rows of the whole sequence, on the host; a row may occur more than once.

        Returns:
            [rows of `share(R)`, D].
        """
        if self.size == 1:
            return hidden[to_device(positions, hidden.device)]
        owners = positions // len(hidden)  # [R] rank that has the row

        # 1. What this rank sends: its rows, in the order of the ranks that score them.
        is_local = owners == self.axis.rank  # [R]
        edges = self._edges(len(positions))
        send = [int(is_local[start:stop].sum()) for start, stop in itertools.pairwise(edges)]
        local_rows = positions[is_local] - self.axis.rank * len(hidden)
        sent = hidden[to_device(local_rows, hidden.device)]

        # 2. What it receives: rank after rank, hence the permutation back to the order of the scored rows.
        senders = owners[self.share(len(positions))]
        receive = torch.bincount(senders, minlength=self.size).tolist()
        received = _AllToAll.apply(sent, self.axis.group, send, receive)
        order = senders.argsort(stable=True).argsort()
        return received[to_device(order, hidden.device)]

    def gather(self, values: Tensor, count: int) -> Tensor:
        """[rows of `share(count)`] -> [count], on every rank.

        All ranks go on to compute the same loss, so the gradient of a rank's own values is already whole: the backward
        pass takes it from the loss as it is, and sums nothing.
        """
        if self.size == 1:
            return values
        return _Gather.apply(values, self.axis, self._edges(count))


class _AllToAll(torch.autograd.Function):
    """Sends `send[r]` rows to rank r and receives `receive[r]` from it; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ctx.group = group
        ctx.send = send
        ctx.receive = receive
        return _exchange(tensor, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(tensor: Tensor, group: Any, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    result = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(result, tensor.contiguous(), list(receive), list(send), group=group)
    return result


class _Gather(torch.autograd.Function):
    """All ranks' values; a rank's gradient is its own slice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: Axis, edges: Sequence[int]) -> Tensor:
        ctx.local = slice(edges[axis.rank], edges[axis.rank + 1])
        counts = [stop - start for start, stop in itertools.pairwise(edges)]
        padded = torch.nn.functional.pad(values.detach(), (0, max(counts) - len(values)))
        received = [values.new_empty(max(counts)) for _ in counts]
        dist.all_gather(received, padded, group=axis.group)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.local], None, None


NO_SEQUENCE_PARALLEL = SequenceParallel()
"""One rank has the whole sequence."""
