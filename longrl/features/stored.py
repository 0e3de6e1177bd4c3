"""The feature cache on disk as the ranks of a team use it: they agree on what is there and share the writing."""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longrl.features.disk import DiskCache
from longrl.features.provenance import numerics, provenance
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis
from longrl.types import Media

logger = logging.getLogger(__name__)

MIB = 1 << 20


@dataclass(frozen=True)
class Lookup:
    """What a team found on disk."""

    features: dict[str, Tensor] = field(default_factory=dict)
    """media key -> [N, D], of media that every rank of the team could read."""
    missed: tuple[tuple[str, frozenset[str]], ...] = ()
    """Of every rank its machine and the keys that it did not find there."""

    def writer(self, key: str, turn: int) -> int | None:
        """The rank of this machine that writes a medium; None if the machine has it."""
        ranks = [rank for rank, (host, keys) in enumerate(self.missed) if host == platform.node() and key in keys]
        return ranks[turn % len(ranks)] if ranks else None


NOTHING = Lookup()


class StoredFeatures:
    """Reads and writes the features of a frozen encoder; its folder may be one for all machines, or each its own.

    Args:
        family: whose encoder it is.
        folder: see `DiskCache`.
        max_bytes: see `DiskCache`.
    """

    def __init__(self, family: CausalFamily, folder: str, max_bytes: int) -> None:
        self.family = family
        self.folder = folder
        self.max_bytes = max_bytes
        self._provenance: str | None = None
        self._caches: dict[str, DiskCache] = {}
        """By the precision that is computed in: SFT encodes within the trainer's autocast, RL before it."""
        self._counts: Counter[str] = Counter()

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if the encoder changes during the run, or the folder cannot be used."""
        media_encoders = self.family.media_encoders(model)
        if not media_encoders:
            name = type(self.family).__name__
            logger.warning("model.feature_cache_dir=%s has no effect: %s reads text only", self.folder, name)
        if any(parameter.requires_grad for module in media_encoders for parameter in module.parameters()):
            raise ValueError(
                "model.feature_cache_dir keeps features of an encoder whose weights stand still, but "
                f"{type(self.family).__name__} trains it; freeze it with model.family.init_args.freeze_vision_encoder=true, or "
                f"leave out model.feature_cache_dir={self.folder}"
            )
        DiskCache(self.folder, "", self.max_bytes)

    def cache(self, model: nn.Module) -> DiskCache:
        """The files of the model's encoder, as it computes here and now. The weights are hashed once."""
        if self._provenance is None:
            self._provenance = provenance(self.family, model)
        how = numerics(self._device(model))
        if how not in self._caches:
            self._caches[how] = DiskCache(self.folder, f"{self._provenance} {how}", self.max_bytes)
        return self._caches[how]

    def _device(self, model: nn.Module) -> torch.device:
        return next(self.family.media_encoders(model)[0].parameters()).device

    def look_up(self, model: nn.Module, media: Sequence[Media], sp_group: Axis) -> Lookup:
        """Reads media. Every rank of the team must call it, with the same media."""
        start = time.perf_counter()
        own = {}
        if media:
            cache = self.cache(model)
            own = {item.key: cache.read(item.key) for item in media}
        missed = frozenset(key for key, stored in own.items() if stored is None)
        # Always gathered, also without media: a rank must not guess what the others have.
        by_rank = tuple(sp_group.gather((platform.node(), missed)))
        lost = frozenset[str]().union(*(keys for _, keys in by_rank))
        found = {key: stored for key, stored in own.items() if stored is not None and key not in lost}
        features = {key: stored.features.to(self._device(model)) for key, stored in found.items()}
        seconds = time.perf_counter() - start
        self._counts["disk"] += len(found)
        self._counts["read_bytes"] += sum(stored.num_bytes for stored in found.values())
        self._counts["read_s"] += seconds
        self._counts["saved_s"] += sum(stored.encode_s for stored in found.values()) - seconds
        return Lookup(features, by_rank)

    def write(
        self, model: nn.Module, features: Mapping[str, Tensor], encode_s: float, lookup: Lookup, sp_group: Axis
    ) -> None:
        """Stores what was encoded after `lookup`, each medium once per machine.

        Args:
            model: has the encoder.
            features: {media key: [N, D]}.
            encode_s: seconds of all of them together; a medium's share is that of its rows.
            lookup: says who lacks what.
            team: the ranks that looked up.
        """
        start = time.perf_counter()
        cache, rows = self.cache(model), sum(map(len, features.values()))
        for turn, (key, tensor) in enumerate(features.items()):
            if lookup.writer(key, turn) == sp_group.rank:
                self._counts["written_bytes"] += cache.write(key, tensor, encode_s * len(tensor) / rows)
        self._counts["write_s"] += time.perf_counter() - start

    def count(self, requested: int, encoded: int) -> None:
        """Adds media asked for and media that the encoder read."""
        self._counts.update(requested=requested, encoded=encoded)

    def collect(self) -> dict[str, float]:
        """Counts since the last call; they add up over ranks."""
        names = ("requested", "encoded", "disk", "read_bytes", "written_bytes", "read_s", "write_s", "saved_s")
        counts = {name: float(self._counts[name]) for name in names}
        broken = sum(cache.num_broken for cache in self._caches.values())
        counts["broken"] = float(broken - self._counts["told_broken"])
        self._counts.clear()
        self._counts["told_broken"] = broken
        return counts


def metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """What is logged of the summed counts of all ranks; seconds are sums over ranks too."""
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
