"""Media features: each distinct image or video goes through the encoder once and serves everyone who needs it.

Letters: N rows (media tokens) of a media item, D feature size.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longrl.features.disk_cache import DiskCache
from longrl.features.encode import distinct_media, encode_shard, gather_rows, row_indices
from longrl.models.base import CausalFamily
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel
from longrl.types import Prompt

MIB = 1 << 20


class FeatureCache:
    """Features by media key, least recently used first out. Valid as long as the encoder's weights are.

    Args:
        family: whose encoder encodes.
        max_bytes: what features kept from earlier steps may take; those of the current call always stay.
        parallel: the ranks among which media are shared.
        disk: where features outlive the run, if they do.
    """

    def __init__(
        self,
        family: CausalFamily,
        max_bytes: int = 1 << 30,
        parallel: Parallel = SINGLE_RANK_GRID,
        disk: DiskCache | None = None,
    ) -> None:
        self.family = family
        self.max_bytes = max_bytes
        self.parallel = parallel
        self.disk = disk
        self.num_encoded = 0
        """Media sent through the encoder so far."""
        self.num_requested = 0
        """Distinct media asked for, summed over calls."""
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._reported = (0, 0)
        """Media requested and encoded that `metrics` has counted."""

    def get_or_encode(self, model: nn.Module, prompts: Sequence[Prompt], counted: bool = True) -> dict[str, Tensor]:
        """{media key: [N, D] features} of the prompts, without gradient. Every rank of the run must call it.

        With `counted` False only what has to be encoded after all enters the hit rate.
        """
        sp_group = self.parallel.sp_group
        media = distinct_media(prompts)
        # 1. What earlier steps left in memory, and what is on disk.
        missing = [item for item in media if item.key not in self._features]
        if self.disk:
            self._features.update(self.disk.read(model, missing, sp_group))
            missing = [item for item in missing if item.key not in self._features]
        # 2. Encode the rest. The weights of an encoder that trains are sharded: then one rank's media need all ranks.
        num_missing = len(missing)
        if self.family.trained_encoders(model):
            num_missing = self.parallel.world.max(num_missing)
        if num_missing:
            start = time.perf_counter()
            with torch.no_grad():
                # One by one: a GPU or BLAS rounds by the size of a call, and what is kept must not depend on what it
                # was encoded with. The cache of a resumed run is empty, and its missing media are others.
                rows = encode_shard(self.family, model, missing, self.parallel, one_by_one=True)  # [n, D]
                if sp_group.size > 1:
                    rows = gather_rows(rows, row_indices(self.family, missing, sp_group.size), self.parallel)
            parts = rows.split([self.family.num_features(item) for item in missing])
            # Copies: a view would keep the rows of all media alive as long as one of them is cached.
            encoded = {item.key: part.clone() for item, part in zip(missing, parts, strict=True)}
            self._features.update(encoded)
            if self.disk:
                if rows.is_cuda:
                    torch.cuda.synchronize(rows.device)  # GPUs compute on after a call returns
                self.disk.write(model, encoded, time.perf_counter() - start, sp_group)
        self.num_encoded += len(missing)
        self.num_requested += len(media) if counted else len(missing)
        # 3. The least recently used go first; those of this call stay whatever their size.
        for item in media:
            self._features.move_to_end(item.key)
        features = {item.key: self._features[item.key] for item in media}
        size = sum(tensor.nbytes for tensor in self._features.values())
        while size > self.max_bytes and len(self._features) > len(features):
            _, oldest = self._features.popitem(last=False)
            size -= oldest.nbytes
        return features

    def metrics(self) -> dict[str, float]:
        """How the cache on disk served all ranks since the last call, which all must make; nothing without one.

        Seconds are sums over ranks.
        """
        if self.disk is None:
            return {}
        local = self.disk.take_counts()
        local["requested"] = self.num_requested - self._reported[0]
        local["encoded"] = self.num_encoded - self._reported[1]
        self._reported = (self.num_requested, self.num_encoded)
        counts = defaultdict(float, self.parallel.dp.sum_dict(local))
        requested = counts["requested"]
        return {
            "throughput/feature_hit_rate": 1 - counts["encoded"] / requested if requested else 1.0,
            "throughput/features_from_disk": counts["disk"],
            "throughput/features_broken": counts["broken"],
            "throughput/feature_read_mib": counts["read_bytes"] / MIB,
            "throughput/feature_written_mib": counts["written_bytes"] / MIB,
            "time/feature_read": counts["read_s"],
            "time/feature_write": counts["write_s"],
            "time/feature_saved": counts["saved_s"],
        }

    def clear(self) -> None:
        """Forgets everything: the encoder's weights have changed."""
        self._features.clear()
