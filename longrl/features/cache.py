"""Media features: each distinct media item goes through the encoder once and serves everyone who needs it.

The ranks of a sequence-parallel group encode each its shard of every media item and gather the features once (MR-SP
stage 1, arXiv:2507.07966).

Letters: N rows of features (media tokens) of all media, n those of one rank, D feature size.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longrl.features.disk_cache import DiskCache
from longrl.io.pulse import PULSE
from longrl.models.base import EncodesMedia
from longrl.models.cell_order import in_order, reordered_rows
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel
from longrl.types import AudioClip, DecodesOnDevice, Frames, FrameShard, Media

MIB = 1 << 20


class HasMedia(Protocol):
    """A prompt, or what follows it."""

    @property
    def media(self) -> tuple[Media, ...]:
        """In the order of their placeholders."""


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
        family: EncodesMedia,
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
        self.num_encoded_bytes = 0
        """Of their features, on this rank."""
        self.num_requested = 0
        """Distinct media asked for, summed over calls."""
        self.last_encoded: frozenset[str] = frozenset()
        """Keys of the media that the last call of `get_or_encode` sent through the encoder."""
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._reported = (0, 0)
        """Media requested and encoded that `metrics` has counted."""

    def get_or_encode(self, model: nn.Module, prompts: Sequence[HasMedia], counted: bool = True) -> dict[str, Tensor]:
        """{media key: [N, D] features} of prompts and continuations, without gradient. Every rank must call it.

        With `counted` False only what has to be encoded after all enters the hit rate.
        """
        sp_group = self.parallel.sp_group
        shown = distinct_media(prompts)
        media = distinct(map(in_order, shown))
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
            self.num_encoded_bytes += sum(part.nbytes for part in encoded.values())
        self.num_encoded += len(missing)
        self.last_encoded = frozenset(item.key for item in missing)
        self.num_requested += len(media) if counted else len(missing)
        # 3. The least recently used go first; those of this call stay whatever their size.
        features = {item.key: self._features[item.key] for item in media}
        self._keep(features)
        # 4. Where cells are shown in another order, their rows are moved: a copy that nobody keeps.
        for item in shown:
            if item.cell_order:
                features[item.key] = reordered_rows(item, features[item.key_in_order])
        return features

    def find(self, key: str) -> Tensor | None:
        """[N, D] features that are in memory, from any thread; that changes nothing, for other ranks ask for others."""
        return self._features.get(key)

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Takes features that were encoded elsewhere: the same in the same order on all ranks of the group."""
        self._features.update(features)
        self._keep(features)

    def _keep(self, features: Mapping[str, Tensor]) -> None:
        """Makes features the most recently used, and lets go of others as long as all are too large."""
        for key in features:
            self._features.move_to_end(key)
        size = sum(tensor.nbytes for tensor in self._features.values())
        while size > self.max_bytes and len(self._features) > len(features):
            _, oldest = self._features.popitem(last=False)
            size -= oldest.nbytes

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


def distinct_media(prompts: Iterable[HasMedia]) -> list[Media]:
    """The media of all prompts and continuations, each key once, in the order met."""
    return distinct(item for prompt in prompts for item in prompt.media)


def distinct(media: Iterable[Media]) -> list[Media]:
    """Each key once, in the order met."""
    return list({item.key: item for item in media}.values())


def encode_shard(
    family: EncodesMedia, model: nn.Module, media: Sequence[Media], parallel: Parallel, one_by_one: bool = False
) -> Tensor:
    """[n, D] features of this rank's temporal patches, item after item.

    Args:
        family: whose encoder encodes.
        model: has the encoder.
        media: with the patches of this rank's shard, or a source of their frames.
        parallel: says which shard that is.
        one_by_one: a call of the encoder for every media item, or several for a large one, with patches made for each
            call.
    """
    shard = FrameShard(parallel.sp_group.rank, parallel.sp_group.size)
    features: list[Tensor] = []
    together: list[Media] = []
    for index, item in enumerate(media):
        count = len(encoded_patches(item, index, shard))
        if not count:  # few temporal patches, and other ranks have them
            continue
        local = replace(item, grid_thw=(count, *item.grid_thw[1:]))
        if local.source is None and not local.patches.numel():
            raise ValueError(
                f"a completion was shown a {item.kind} ({item.key}) whose pixels are not kept and whose features are "
                "gone; an environment's frames need a `source` that gives them again"
            )
        parts = [local] if local.source is None else patched_parts(family, local, encoder_device(family, model))
        if not one_by_one:
            together += parts
            continue
        for part in parts:
            PULSE.beats += 1
            features += family.encode_media(model, [part])
    if together:
        features = family.encode_media(model, together)
    if not features:  # a sharded encoder needs all ranks: this one encodes a black image that nobody reads
        pixels = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
        return family.encode_media(model, [family.patch(Frames("image", pixels, (0.0,), "black"))])[0][:0]
    return torch.cat(features)


def encoded_patches(item: Media, index: int, shard: FrameShard) -> range:
    """The temporal patches of a media item that a rank encodes; of whole items, by their index, ranks take turns.

    So a whole item is encoded in calls of the same sizes whatever the ranks, and has the same bits again.
    """
    num_patches = item.grid_thw[0]
    if item.is_whole:
        return range(num_patches if index % shard.size == shard.rank else 0)
    return shard.temporal_patches(num_patches)


def encoder_device(family: EncodesMedia, model: nn.Module) -> torch.device | None:
    """Where the weights of the encoder are; None of a family without one."""
    weights = (parameter for encoder in family.media_encoders(model) for parameter in encoder.parameters())
    return next((parameter.device for parameter in weights), None)


def patched_parts(family: EncodesMedia, item: Media, device: torch.device | None = None) -> Iterator[Media]:
    """A media item as the encoder is given it: as it is, or part by part while its frames are still being decoded.

    Where patches were left out, a part has `family.temporal_patches_per_encode` temporal patches, however its source
    cuts the frames: a feature must not depend on that, and an encoder may round by the size of a call. No more than a
    part is held.

    Args:
        family: makes patches.
        item: without them.
        device: of the encoder, on which a source may decode.

    Raises:
        ValueError: the file has changed since.
        UnusableSample: it cannot be read any more.
    """
    assert item.source is not None, "its patches are here"
    if item.kind == "audio":
        clip = next(item.source())
        yield replace(item, patches=_patch_same(family, clip, item).patches, source=None)
        return
    source = item.source
    decoded = source() if device is None or not isinstance(source, DecodesOnDevice) else source.decoded_on(device)
    resized = (family.resize(frames) for frames in decoded if isinstance(frames, Frames))
    for frames in regroup_frames(resized, family.temporal_patches_per_encode(item) * item.temporal_patch_size):
        yield _patch_same(family, frames, item).part(-(-len(frames.pixels) // item.temporal_patch_size))


def _patch_same(family: EncodesMedia, part: Frames | AudioClip, item: Media) -> Media:
    """A part of a media item's file as patches, if that is still the file the media item was rendered from."""
    patched = family.patch(part)
    if patched.key != item.key:
        raise ValueError("a media item changed while it was in use; leave data.media_root alone while a run reads it")
    return patched


def regroup_frames(parts: Iterator[Frames], num_frames: int) -> Iterator[Frames]:
    """The same frames in parts of `num_frames`, the last one perhaps smaller."""
    waiting: list[Tensor] = []
    for part in parts:
        left = part.pixels
        while len(left):
            room = num_frames - sum(map(len, waiting))
            waiting.append(left[:room])
            left = left[room:]
            if room <= len(waiting[-1]):
                yield replace(part, pixels=torch.cat(waiting) if len(waiting) > 1 else waiting[0])
                waiting = []
    if waiting:
        yield replace(part, pixels=torch.cat(waiting))


def row_indices(family: EncodesMedia, media: Sequence[Media], num_ranks: int) -> list[Tensor]:
    """For every rank of a sequence-parallel group the indices of its rows, all media laid end to end: [n] of N."""
    indices = []
    for rank in range(num_ranks):
        shard = FrameShard(rank, num_ranks)
        local = [torch.empty(0, dtype=torch.int64)]
        offset = 0
        for index, item in enumerate(media):
            num_rows = family.num_features(item)
            rows_per_patch = family.num_features(item.part(1))
            patches = encoded_patches(item, index, shard)
            start = min(patches.start * rows_per_patch, num_rows)
            stop = min(patches.stop * rows_per_patch, num_rows)  # the last window of a sound may be shorter
            local.append(torch.arange(offset + start, offset + stop))
            offset += num_rows
        indices.append(torch.cat(local))
    return indices


def gather_rows(rows: Tensor, indices: Sequence[Tensor], parallel: Parallel) -> Tensor:
    """[N, D] rows of all ranks of the sequence-parallel group.

    They come in `parallel.num_gather_chunks` messages, which bounds what is in flight.

    Args:
        rows: [n, D] of this rank.
        indices: for every rank those of its rows among the N, see `row_indices`.
        parallel: the group and the number of messages.
    """
    gathered = rows.new_empty(sum(map(len, indices)), rows.shape[1])
    longest = max(map(len, indices))
    step = max(1, -(-longest // parallel.num_gather_chunks))
    for start in range(0, longest, step):
        sent = rows.new_zeros(step, rows.shape[1])  # padded: all ranks must send as much
        local = rows[start : start + step]
        sent[: len(local)] = local
        received = [torch.empty_like(sent) for _ in indices]
        dist.all_gather(received, sent, group=parallel.sp_group.group)
        for part, of_rank in zip(received, indices, strict=True):
            chunk = of_rank[start : start + step].to(gathered.device)
            gathered[chunk] = part[: len(chunk)]
    return gathered
