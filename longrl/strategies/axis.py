"""One direction of the grid of ranks, and the few collectives longrl needs along it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """Largest number on the axis."""
        if self.size == 1:
            return number
        return int(self._reduce(torch.tensor(number, device=self._device()), dist.ReduceOp.MAX))

    def sum_dict(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of named numbers; a name that another rank lacks counts 0 there."""
        if self.size == 1:
            return dict(values)
        names = sorted({name for other in self.gather(sorted(values)) for name in other})
        numbers = [values.get(name, 0.0) for name in names]
        total = self.sum(torch.tensor(numbers, dtype=torch.float64, device=self._device()))
        return dict(zip(names, total.tolist(), strict=True))

    def raise_on_any_rank(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank, or the error of any rank, raised on all: none waits for one that failed.

        `work` that talks to other ranks must not leave them waiting when it fails.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else repr(error))
        if error is not None:
            raise error
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failed:
            raise RuntimeError("; ".join(failed))
        return result  # type: ignore[return-value]  # there is one without error

    def gather(self, item: Any) -> list[Any]:
        """Any picklable thing of every rank, in their order."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def gather_list(self, items: Sequence[Any], num_chunks: int = 1) -> list[Any]:
        """The items of all ranks in one list, rank after rank within each of `num_chunks` messages."""
        edges = [len(items) * chunk // num_chunks for chunk in range(num_chunks + 1)]
        messages = (self.gather(list(items[start:stop])) for start, stop in itertools.pairwise(edges))
        return [item for message in messages for own in message for item in own]

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, operation, group=self.group)
        return tensor

    def _device(self) -> torch.device:
        on_gpu = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


SINGLE_RANK = Axis()
"""A rank alone."""


def world() -> Axis:
    """All ranks of the run."""
    return Axis.of(None) if dist.is_initialized() else SINGLE_RANK
