"""One axis of the grid of ranks, and the few collectives longrl needs along it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True)
class Axis:
    """Ranks that talk to each other. The default is a rank alone, whose collectives do nothing."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Axis:
        """The axis of a process group; None is all ranks of the run."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the axis, the same on all its ranks."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, group=self.group)
        return total

    def max(self, number: NumberT) -> NumberT:
        """Largest number on the axis; an integer is below 2^53."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self._device())
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return type(number)(largest.item())

    def sum_dict(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of named numbers; a name that another rank lacks counts 0 there."""
        if self.size == 1:
            return dict(values)
        by_rank = self.gather(sorted(values))
        names = sorted({name for names in by_rank for name in names})
        local = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64, device=self._device())
        return dict(zip(names, self.sum(local).tolist(), strict=True))

    @contextlib.contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """An error inside the block on any rank is raised on all of them, so that none waits for one that failed.

        Every rank of the axis must enter. A block that talks to other ranks must not leave them waiting when it fails.

        Example:
            with axis.raise_on_any_rank():
                completions = engine.generate(...)
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else repr(error))
        if error is not None:
            raise error
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failed:
            raise RuntimeError("; ".join(failed))

    def gather(self, item: Any) -> list[Any]:
        """Any picklable thing of every rank, in their order."""
        if self.size == 1:
            return [item]
        by_rank: list[Any] = [None] * self.size
        dist.all_gather_object(by_rank, item, group=self.group)
        return by_rank

    def gather_list(self, items: Sequence[Any], num_chunks: int = 1) -> list[Any]:
        """The items of all ranks in one list, rank after rank within each of `num_chunks` messages."""
        edges = [len(items) * chunk // num_chunks for chunk in range(num_chunks + 1)]
        gathered: list[Any] = []
        for start, stop in itertools.pairwise(edges):
            for of_rank in self.gather(list(items[start:stop])):
                gathered += of_rank
        return gathered

    def _device(self) -> torch.device:
        on_gpu = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


SINGLE_RANK = Axis()
"""A rank alone."""


def world_axis() -> Axis:
    """All ranks of the run."""
    return Axis.of(None) if dist.is_initialized() else SINGLE_RANK
