"""Media features: each distinct image or video goes through the encoder once and serves everyone who needs it.

The ranks of a team encode its temporal cells in parallel, each its share, and gather the result once (MR-SP stage 1,
arXiv:2507.07966). Letters: N rows (media tokens), D feature size.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longrl.features.pieces import pieces
from longrl.features.stored import NOTHING, StoredFeatures, metrics
from longrl.models.base import CausalFamily
from longrl.strategies.parallel import Parallel
from longrl.types import Frames, FrameShard, Media, Prompt

SINGLE_RANK_GRID = Parallel()


def distinct_media(prompts: Iterable[Prompt]) -> list[Media]:
    """The media of all prompts, each key once, in the order met."""
    return list({media.key: media for prompt in prompts for media in prompt.media}.values())


class FeatureCache:
    """Features by media key, least recently used first out. Valid as long as the encoder's weights are.

    Args:
        family: whose encoder encodes.
        max_bytes: what features kept from earlier steps may take; those of the current call always stay.
        parallel: the ranks among which media are shared.
        stored: where features outlive the run, if they do.
    """

    def __init__(
        self,
        family: CausalFamily,
        max_bytes: int = 1 << 30,
        parallel: Parallel = SINGLE_RANK_GRID,
        stored: StoredFeatures | None = None,
    ) -> None:
        self.family = family
        self.max_bytes = max_bytes
        self.parallel = parallel
        self.stored = stored
        self.num_encoded = 0
        """Media sent through the encoder so far."""
        self.num_requested = 0
        """Distinct media asked for, summed over calls."""
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def get_or_encode(self, model: nn.Module, prompts: Sequence[Prompt], counted: bool = True) -> dict[str, Tensor]:
        """{media key: [N, D] features} of the prompts, without gradient. Every rank of the run must call it.

        With `counted` False only what has to be encoded after all enters the hit rate.
        """
        media = distinct_media(prompts)
        missing = [item for item in media if item.key not in self._features]
        lookup = self.stored.look_up(model, missing, self.parallel.sp_group) if self.stored else NOTHING
        self._features.update(lookup.features)
        missing = [item for item in missing if item.key not in lookup.features]
        if self._anyone_encodes(model, missing):
            start = time.perf_counter()
            with torch.no_grad():
                # One by one: a GPU or BLAS rounds by the size of a call, and what is kept must not depend on what it
                # was encoded with. The cache of a resumed run is empty, and its missing media are others.
                rows = encode_share(self.family, model, missing, self.parallel, singly=True)
                whole = gather_rows(rows, _places(self.family, missing, self.parallel.sp_group.size), self.parallel)
            made = dict(zip([item.key for item in missing], self._split(whole, missing), strict=True))
            self._features.update(made)
            if self.stored:
                seconds = _finished(whole) - start
                self.stored.write(model, made, seconds, lookup, self.parallel.sp_group)
        self.num_encoded += len(missing)
        requested = len(media) if counted else len(missing)
        self.num_requested += requested
        if self.stored:
            self.stored.count(requested, len(missing))
        for item in media:
            self._features.move_to_end(item.key)
        found = {item.key: self._features[item.key] for item in media}
        self._evict(keep=len(found))
        return found

    def _anyone_encodes(self, model: nn.Module, missing: Sequence[Media]) -> bool:
        """Whether this rank has something to encode, or another needs it to gather the weights of a sharded encoder."""
        if self.family.vision_encoder_trains(model):
            return self.parallel.world.max(len(missing)) > 0
        return len(missing) > 0

    def _split(self, rows: Tensor, media: Sequence[Media]) -> list[Tensor]:
        return [part.clone() for part in rows.split([self.family.num_features(item) for item in media])]

    def metrics(self) -> dict[str, float]:
        """How the cache on disk served all ranks since the last call, which all must make; nothing without one."""
        return metrics(self.parallel.dp.sum_dict(self.stored.collect())) if self.stored else {}

    def clear(self) -> None:
        """Forgets everything: the encoder's weights have changed."""
        self._features.clear()

    def _evict(self, keep: int) -> None:
        size = sum(tensor.nbytes for tensor in self._features.values())
        while size > self.max_bytes and len(self._features) > keep:
            _, oldest = self._features.popitem(last=False)
            size -= oldest.nbytes


def _finished(tensor: Tensor) -> float:
    """The time at which a tensor is there: GPUs compute on after a call returns."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


class TrainableFeatures:
    """Features of a encoder that trains: encoded once per optimizer step, with one backward pass through the encoder.

    Micro-batches read `leaves` and leave their gradients there; `backward` sends the sum through the encoder. A rank that
    has nothing to encode encodes a black image, with zero gradient: a sharded encoder needs all ranks. Every rank must
    make one, and call its `backward`.

    Example:
        features = TrainableFeatures(family, model, prompts)
        for packed in micro_batches:
            loss(family.forward(model, packed, features.leaves)).backward()
        features.backward()
    """

    def __init__(
        self, family: CausalFamily, model: nn.Module, prompts: Sequence[Prompt], parallel: Parallel = SINGLE_RANK_GRID
    ) -> None:
        media = distinct_media(prompts)
        self._parallel = parallel
        self._places = _places(family, media, parallel.sp_group.size)
        self._rows = encode_share(family, model, media, parallel) if parallel.world.max(len(media)) else None
        whole = () if self._rows is None else gather_rows(self._rows.detach(), self._places, parallel)
        counts = [family.num_features(item) for item in media]
        self.leaves = {
            item.key: part.clone().requires_grad_()
            for item, part in zip(media, whole.split(counts) if media else (), strict=True)
        }

    def backward(self) -> None:
        """Adds the encoder's gradients. Media that no micro-batch used have none."""
        unused = all(leaf.grad is None for leaf in self.leaves.values())
        if self._rows is None or (unused and self._parallel.world.size == 1):
            return
        own = self._rows.new_zeros(self._rows.shape)
        if self.leaves:
            grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves.values()]
            sp_group = self._parallel.sp_group
            own = sp_group.sum(torch.cat(grads))[self._places[sp_group.rank].to(own.device)]
        if not self._rows.requires_grad:  # all of a encoder that stands still, beside one that trains
            return
        torch.autograd.backward(self._rows, own)


def encode_share(
    family: CausalFamily, model: nn.Module, media: Sequence[Media], parallel: Parallel, singly: bool = False
) -> Tensor:
    """[n, D] features of this rank's cells, medium after medium.

    Args:
        family: whose encoder encodes.
        model: has the encoder.
        media: with the patches of this rank's cells, or a source of their frames.
        parallel: says which those are.
        singly: a encoder call for every medium, or several for a large one; patches are made call by call.
    """
    share = FrameShard(parallel.sp_group.rank, parallel.sp_group.size)
    cells = [len(share.temporal_patches(item.grid_thw[0])) for item in media]
    parts = [item.part(count) for item, count in zip(media, cells, strict=True) if count]
    if not parts:
        black = family.patch(Frames("image", torch.zeros(1, 3, 56, 56, dtype=torch.uint8), (0.0,), "black"))
        return family.encode_media(model, [black])[0][:0]
    patched = (piece for part in parts for piece in pieces(family, part))
    calls = ([piece] for piece in patched) if singly else [list(patched)]
    return torch.cat([features for call in calls for features in family.encode_media(model, call)])


def gather_rows(rows: Tensor, places: Sequence[Tensor], parallel: Parallel) -> Tensor:
    """[N, D] rows of all ranks of the team, in `num_gather_chunks` messages that bound what is in flight.

    Args:
        rows: [n, D] of this rank.
        places: for every rank the numbers of its rows among the N.
        parallel: team and number of chunks.
    """
    sp_group = parallel.sp_group
    if sp_group.size == 1:
        return rows
    whole = rows.new_empty(sum(map(len, places)), rows.shape[1])
    longest = max(map(len, places))
    step = max(1, -(-longest // parallel.num_gather_chunks))
    for start in range(0, longest, step):
        sent = rows.new_zeros(step, rows.shape[1])
        own = rows[start : start + step]
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in places]
        dist.all_gather(received, sent, group=sp_group.group)
        for part, numbers in zip(received, places, strict=True):
            chunk = numbers[start : start + step].to(whole.device)
            whole[chunk] = part[: len(chunk)]
    return whole


def _places(family: CausalFamily, media: Sequence[Media], size: int) -> list[Tensor]:
    """For every rank of a team the numbers of its rows, all media laid end to end."""
    per_cell = [family.num_features(item.part(1)) for item in media]
    offsets = list(itertools.accumulate((family.num_features(item) for item in media), initial=0))
    places = []
    for rank in range(size):
        parts = [torch.empty(0, dtype=torch.int64)]
        for item, rows, offset in zip(media, per_cell, offsets, strict=False):
            cells = FrameShard(rank, size).temporal_patches(item.grid_thw[0])
            end = family.num_features(item)  # the last window of a sound may be shorter
            start, stop = (min(cell * rows, end) for cell in (cells.start, cells.stop))
            parts.append(torch.arange(offset + start, offset + stop))
        places.append(torch.cat(parts))
    return places
