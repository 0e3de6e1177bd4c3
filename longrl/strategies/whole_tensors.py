"""Whole tensors of sharded ones, bit for bit: neighbours are gathered together, many of them in one message.

A message costs its latency whatever it carries, and most tensors of a model are small: norms, biases, adapters. So the
shards of neighbouring tensors are laid end to end in one buffer of bytes, whatever their precision:

    rank 0   [ rows of a | rows of b | ... ]
    rank 1   [ rows of a | rows of b | ... ]      one all-gather; then a = its rows of rank 0, of rank 1, ...

FSDP2 cuts along the first dimension into parts of ceil(n / ranks) rows, so that the last ranks may have fewer, or none:
their places are as large, and what is behind the n-th row is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET_BYTES = 512 << 20
"""Of the whole tensors that are gathered together, unless it is given."""
ALIGNMENT = 16
"""Bytes: a tensor of any precision may be read where it begins."""
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Of one tensor; it has the first name since torch 2.13."""


def whole_tensors(tensors: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Tensor]:
    """The tensors in their order, whole; every rank must go through them.

    Gathered ones are on the device that their ranks talk from, others where they were.
    Memory beside the shards: a bucket and the tensor that was given last. One that is larger than a bucket has a bucket
    of its own, which is itself the whole tensor.

    Args:
        tensors: shards of FSDP2, of weights in full or replicated over some ranks; others pass as they are.
        bucket_bytes: of whole tensors that are gathered together.
    """
    bucket: list[Tensor] = []
    group: dist.ProcessGroup | None = None
    room = 0
    for tensor in tensors:
        others = _shard_group(tensor)
        size = tensor.numel() * tensor.element_size()
        if others is not None and bucket and (size > room or group not in (None, others)):
            yield from _gather(bucket, group)
            bucket = []
            group = None
        if others is not None:
            room = (bucket_bytes if group is None else room) - size
            group = others
        bucket.append(tensor)
    yield from _gather(bucket, group)


def _shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that a tensor's rows are spread over; None if this rank has them all."""
    if not isinstance(tensor, DTensor):
        return None
    group = None
    for axis, placement in enumerate(tensor.placements):
        if tensor.device_mesh.size(axis) == 1 or isinstance(placement, Replicate):
            continue
        cuts_rows = type(placement) is Shard and placement.dim == 0
        assert cuts_rows, f"FSDP2 cuts rows, got {placement}"
        assert group is None, "FSDP2 cuts once"
        group = tensor.device_mesh.get_group(axis)
    return group


def _gather(bucket: Sequence[Tensor], group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """The tensors of a bucket, whole. Those that are so already are given as they are."""
    if group is None:
        yield from map(_local, bucket)
        return
    num_ranks = group.size()
    is_shard = [_shard_group(tensor) is not None for tensor in bucket]
    shards = list(itertools.compress(bucket, is_shard))

    # 1. Where each shard begins; all ranks have as much room for it.
    sizes = [-(-len(shard) // num_ranks) * _row_bytes(shard) for shard in shards]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:-1]] + sizes[-1:]
    starts = [0, *itertools.accumulate(rooms)]

    # 2. One message, in place: what is sent lies where it is received. Under offload shards come from host memory.
    device = bucket[is_shard.index(True)].device_mesh.device_type  # type: ignore[attr-defined]
    received = torch.empty(num_ranks * starts[-1], dtype=torch.uint8, device=device)
    by_rank = received.view(num_ranks, -1)  # [ranks, bytes]
    own = by_rank[group.rank()]
    for start, shard in zip(starts, shards, strict=False):
        rows = _local(shard).reshape(-1).view(torch.uint8)
        own[start : start + len(rows)].copy_(rows, non_blocking=True)
    all_gather(received, own, group=group)

    # 3. Rows of all ranks behind each other. A lone tensor lies so already; of others each is a copy, made when asked.
    places = iter(zip(starts, sizes, strict=False))
    for tensor, was_shard in zip(bucket, is_shard, strict=True):
        if not was_shard:
            yield _local(tensor)
            continue
        start, size = next(places)
        rows = by_rank[:, start : start + size].reshape(-1)
        yield rows[: len(tensor) * _row_bytes(tensor)].view(tensor.dtype).view(tensor.shape)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.element_size()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
