"""Features during a rollout: those of prompts, and of what environments show to completions on this rank.

Letters: N rows of features of a media item, D feature size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from longrl.features.cache import FeatureCache, gather_rows
from longrl.models.cell_order import reordered_rows
from longrl.strategies.parallel import Parallel
from longrl.types import Media


class RolloutFeatures(MutableMapping[str, Tensor]):
    """{media key: [N, D]} of a rollout: what is not here is looked up in the cache, and what is set was encoded.

    Threads of environments use it beside the engine. The cache is only read: its content is the same on all ranks of a
    sequence-parallel group, which are shown different things until `shared_features`.

    Args:
        of_prompts: features of the prompts, the same on all ranks of the group.
        cache: where other steps left theirs.
        reordered: videos with their cells in another order, whose rows are moved whenever they are asked for: a copy
            of all would take as much memory again.
    """

    def __init__(self, of_prompts: Mapping[str, Tensor], cache: FeatureCache, reordered: Sequence[Media] = ()) -> None:
        self.shown: dict[str, Tensor] = {}
        """Those of what environments showed on this rank."""
        self.num_encoded = 0
        """Media items that went through the encoder on this rank, for no cache had their features."""
        self.encoded: set[str] = set()
        """Their keys."""
        self._of_prompts = of_prompts
        self._cache = cache
        self._reordered = {item.key: item for item in reordered}

    @override
    def __getitem__(self, key: str) -> Tensor:
        for features in (self._of_prompts, self.shown):
            if key in features:
                return features[key]
        if key in self._reordered:
            item = self._reordered[key]
            return reordered_rows(item, self[item.key_in_order])
        found = self._cache.find(key)
        if found is None:
            raise KeyError(key)
        self.shown[key] = found
        return found

    @override
    def __setitem__(self, key: str, features: Tensor) -> None:
        self.shown[key] = features
        self.encoded.add(key)
        self.num_encoded += 1

    @override
    def __delitem__(self, key: str) -> None:
        del self.shown[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter({**self._of_prompts, **self.shown, **self._reordered})

    @override
    def __len__(self) -> int:
        return len({*self._of_prompts, *self.shown, *self._reordered})


def shared_features(local: Mapping[str, Tensor], device: torch.device, parallel: Parallel) -> dict[str, Tensor]:
    """{media key: [N, D]} that any rank of a sequence-parallel group has, on all of them; each comes from one rank.

    Every rank of the group must call it. All get them in the same order.

    Args:
        local: this rank's.
        device: of the result.
        parallel: the group, and the number of messages.
    """
    sp_group = parallel.sp_group
    if sp_group.size == 1:
        return dict(local)
    # 1. Of what several have the first rank's is sent.
    by_rank = sp_group.gather({key: (*rows.shape, rows.dtype) for key, rows in local.items()})
    owners: dict[str, tuple[int, int, int, torch.dtype]] = {}
    for rank, shapes in reversed([*enumerate(by_rank)]):
        owners |= {key: (rank, *shape) for key, shape in shapes.items()}
    if not owners:
        return {}
    # 2. The rows of all, owner after owner.
    indices: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.int64)] for _ in by_rank]
    start = 0
    for rank, num_rows, _, _ in owners.values():
        indices[rank].append(torch.arange(start, start + num_rows))
        start += num_rows
    _, _, size, dtype = next(iter(owners.values()))
    sent = [local[key] for key, (rank, *_) in owners.items() if rank == sp_group.rank]
    rows = torch.cat([torch.zeros(0, size, dtype=dtype, device=device), *sent])
    gathered = gather_rows(rows, [torch.cat(each) for each in indices], parallel)
    # 3. Copies: a view would keep the rows of all as long as one of them is cached.
    parts = gathered.split([num_rows for _, num_rows, _, _ in owners.values()])
    return {key: part.clone() for key, part in zip(owners, parts, strict=True)}
