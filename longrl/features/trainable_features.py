"""Features of an encoder that trains: one forward and one backward pass through it per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from longrl.features.cache import HasMedia, distinct_media, encode_shard, gather_rows, row_indices
from longrl.models.base import EncodesMedia
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel


class TrainableFeatures:
    """Features of an encoder that trains: encoded once per optimizer step, with one backward pass through the encoder.

    Micro-batches read `leaves` and leave their gradients there; `backward` sends the sum through the encoder. A rank
    that has nothing to encode encodes a black image, with zero gradient: a sharded encoder needs all ranks. Every rank
    must make one, and call its `backward`.

    Args:
        family: whose encoder encodes.
        model: has the encoder.
        prompts: of the step, and what follows them, on this sequence-parallel group.
        parallel: the ranks among which media are shared.

    Example:
        features = TrainableFeatures(family, model, prompts)
        for packed in micro_batches:
            loss(family.forward(model, packed, features.leaves)).backward()
        features.backward()
    """

    def __init__(
        self, family: EncodesMedia, model: nn.Module, prompts: Sequence[HasMedia], parallel: Parallel = SINGLE_RANK_GRID
    ) -> None:
        media = distinct_media(prompts)
        self.leaves = {}
        """media key -> [N, D] features, whose `grad` micro-batches fill."""
        self._parallel = parallel
        self._rows = encode_shard(family, model, media, parallel) if parallel.world.max(len(media)) else None  # [n, D]
        if not media or self._rows is None:
            return
        rows = self._rows.detach()
        if parallel.sp_group.size > 1:
            self._indices = row_indices(family, media, parallel.sp_group.size)
            rows = gather_rows(rows, self._indices, parallel)  # [N, D]
        parts = rows.split([family.num_features(item) for item in media])
        for item, part in zip(media, parts, strict=True):
            self.leaves[item.key] = part.clone().requires_grad_()

    def backward(self) -> None:
        """Adds the encoder's gradients. Media that no micro-batch used have none."""
        unused = all(leaf.grad is None for leaf in self.leaves.values())
        if self._rows is None or (unused and self._parallel.world.size == 1):
            return
        grad = torch.zeros_like(self._rows)  # [n, D]
        if self.leaves:
            grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves.values()]
            grad = torch.cat(grads)
            sp_group = self._parallel.sp_group
            if sp_group.size > 1:  # each rank has the gradient of its micro-batches, and encoded its rows
                grad = sp_group.sum(grad)[self._indices[sp_group.rank].to(grad.device)]
        if self._rows.requires_grad:  # else all of it comes from a frozen encoder, beside one that trains
            torch.autograd.backward(self._rows, grad)
