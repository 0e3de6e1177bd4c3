"""Weights laid end to end in buckets of bytes: what sender and receivers of a broadcast cut alike from one list.

```
bucket 0   [ a | b | ... ]     each from a multiple of 16 bytes on
bucket 1   [ c ]               a tensor larger than a bucket has one of its own
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: a tensor of any precision may be read where it begins."""
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Precisions of weights by the names that orders have for them."""


@dataclass(frozen=True)
class Listed:
    """A weight that is announced before it comes."""

    name: str
    """The engine's."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes in a bucket."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    def as_json(self) -> list[object]:
        """What `check_listed` reads."""
        return [self.name, list(self.shape), str(self.dtype).removeprefix("torch.")]


def cut_buckets(listed: Sequence[Listed], max_bytes: int) -> list[list[Listed]]:
    """Neighbouring weights that travel together.

    Args:
        listed: all of them.
        max_bytes: of a bucket; a larger weight is one of its own.
    """
    buckets: list[list[Listed]] = [[]]
    room = max_bytes
    for each in listed:
        if buckets[-1] and each.room > room:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(each)
        room -= each.room
    return buckets


def empty_bucket(bucket: Sequence[Listed], device: torch.device) -> Tensor:
    """[bytes] for a bucket's weights."""
    return torch.empty(sum(each.room for each in bucket), dtype=torch.uint8, device=device)


def weights_in(buffer: Tensor, bucket: Sequence[Listed]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a bucket, as views of its bytes.

    Args:
        buffer: of `empty_bucket`.
        bucket: its weights.
    """
    start = 0
    for each in bucket:
        yield each.name, buffer[start : start + each.nbytes].view(each.dtype).view(each.shape)
        start += each.room


def fill_bucket(buffer: Tensor, bucket: Sequence[Listed], weights: Iterator[tuple[str, Tensor]]) -> None:
    """Copies the next weights into a bucket, rounded to the precisions that were announced.

    Raises:
        RuntimeError: others come than were announced.
    """
    for announced, place in weights_in(buffer, bucket):
        name, weight = next(weights, ("nothing", place))
        if name != announced or weight.shape != place.shape:
            raise RuntimeError(
                f"{name} {list(weight.shape)} comes where {announced} {list(place.shape)} was announced to the servers"
            )
        place.copy_(weight)
