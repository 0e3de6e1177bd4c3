"""The feature cache on disk as ranks use it together: they agree on what is there and share the writing."""

from __future__ import annotations

import logging
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from longrl.features.files import FeatureFiles
from longrl.features.provenance import encoder_precision, encoder_provenance
from longrl.models.base import EncodesMedia
from longrl.strategies.axis import Axis
from longrl.types import Media

logger = logging.getLogger(__name__)


class DiskCache:
    """Reads and writes the features of a frozen encoder; its folder may be one for all machines, or each its own.

    Args:
        family: whose encoder it is.
        folder: see `FeatureFiles`.
        max_bytes: see `FeatureFiles`.
    """

    def __init__(self, family: EncodesMedia, folder: str, max_bytes: int) -> None:
        self.family = family
        self.folder = folder
        self.max_bytes = max_bytes
        self._provenance: str | None = None
        self._files: dict[str, FeatureFiles] = {}
        """By the precision that is computed in: SFT encodes within the trainer's autocast, RL before it."""
        self._missed: list[tuple[str, frozenset[str]]] = []
        """Machine of every rank, and the keys that the last `read` did not find there."""
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._num_broken = 0
        """Broken files that `take_counts` has counted."""

    def check_encoder(self, model: nn.Module) -> None:
        """Raises ValueError if the encoder changes during the run, or the folder cannot be used."""
        media_encoders = self.family.media_encoders(model)
        if not media_encoders:
            name = type(self.family).__name__
            logger.warning("model.feature_cache_dir=%s has no effect: %s reads text only", self.folder, name)
        if any(parameter.requires_grad for module in media_encoders for parameter in module.parameters()):
            raise ValueError(
                "model.feature_cache_dir keeps features of an encoder whose weights stand still, but "
                f"{type(self.family).__name__} trains it; freeze it with "
                "model.family.init_args.freeze_vision_encoder=true, or leave out "
                f"model.feature_cache_dir={self.folder}"
            )
        FeatureFiles(self.folder, "", self.max_bytes)

    def files(self, model: nn.Module) -> FeatureFiles:
        """The files of the model's encoder, as it computes here and now. The weights are hashed once."""
        if self._provenance is None:
            self._provenance = encoder_provenance(self.family, model)
        precision = encoder_precision(self._device(model))
        if precision not in self._files:
            self._files[precision] = FeatureFiles(self.folder, f"{self._provenance} {precision}", self.max_bytes)
        return self._files[precision]

    def _device(self, model: nn.Module) -> torch.device:
        return next(self.family.media_encoders(model)[0].parameters()).device

    def read(self, model: nn.Module, media: Sequence[Media], sp_group: Axis) -> dict[str, Tensor]:
        """{media key: [N, D]} of the media that every rank of the group could read.

        Args:
            model: has the encoder.
            media: the same on all ranks of the group, all of which must call.
            sp_group: the ranks that share media.
        """
        # 1. What this rank finds.
        start = time.perf_counter()
        entries = {}
        if media:
            files = self.files(model)
            entries = {item.key: files.read(item.key) for item in media}
        # 2. What any rank lacks is encoded by all. Gathered also without media: a rank must not guess what others have.
        missed = frozenset(key for key, entry in entries.items() if entry is None)
        self._missed = sp_group.gather((platform.node(), missed))
        missed_anywhere = frozenset[str]().union(*(keys for _, keys in self._missed))
        features = {}
        for key, entry in entries.items():
            if entry is not None and key not in missed_anywhere:
                tensor, encode_s = entry
                features[key] = tensor.to(self._device(model))
                self._counts["disk"] += 1
                self._counts["read_bytes"] += tensor.nbytes
                self._counts["saved_s"] += encode_s
        # 3. Reading is what saving costs.
        seconds = time.perf_counter() - start
        self._counts["read_s"] += seconds
        self._counts["saved_s"] -= seconds
        return features

    def write(self, model: nn.Module, features: Mapping[str, Tensor], encode_s: float, sp_group: Axis) -> None:
        """Stores what was encoded after the last `read`, each media item once per machine.

        Args:
            model: has the encoder.
            features: {media key: [N, D]}.
            encode_s: seconds of all of them together; a media item's part is that of its rows.
            sp_group: the ranks that have read.
        """
        start = time.perf_counter()
        files = self.files(model)
        num_rows = sum(map(len, features.values()))
        for turn, (key, tensor) in enumerate(features.items()):
            # The ranks of this machine that lack it take turns; those that have it write nothing.
            ranks = [rank for rank, (host, keys) in enumerate(self._missed) if host == platform.node() and key in keys]
            if ranks and ranks[turn % len(ranks)] == sp_group.rank:
                self._counts["written_bytes"] += files.write(key, tensor, encode_s * len(tensor) / num_rows)
        self._counts["write_s"] += time.perf_counter() - start

    def take_counts(self) -> defaultdict[str, float]:
        """Files, bytes and seconds since the last call; they add up over ranks."""
        counts = self._counts
        self._counts = defaultdict(float)
        num_broken = sum(files.num_broken for files in self._files.values())
        counts["broken"] = num_broken - self._num_broken
        self._num_broken = num_broken
        return counts
