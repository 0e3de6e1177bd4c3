"""A medium as the encoder is given it: whole, or cell by cell while its frames are still being decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from longrl.models.base import CausalFamily
from longrl.types import Frames, Media


def pieces(family: CausalFamily, item: Media) -> Iterator[Media]:
    """The temporal cells of a medium that are here, as media of their own with patches.

    Where patches were left out, a piece has `family.temporal_patches_per_encode` cells, however its source cuts the frames: a
    feature must not depend on that, and a encoder may round by the size of a call. No more than a piece is held.

    Raises:
        ValueError: the file has changed since.
        UnusableSample: it cannot be read any more.
    """
    if item.source is None:
        yield item
        return
    if item.kind == "audio":
        (sound,) = item.source()
        yield replace(item, patches=same(item, family.patch(sound)).patches, source=None)
        return
    per_cell = item.temporal_patch_size
    resized = map(family.resize, item.source())
    for frames in regrouped(resized, family.temporal_patches_per_encode(item) * per_cell):
        yield same(item, family.patch(frames)).part(-(-len(frames.pixels) // per_cell))


def same(item: Media, made: Media) -> Media:
    """What was made of a medium's file, if that is still the one the medium was rendered from."""
    if made.key != item.key:
        raise ValueError("a medium changed while it was in use; leave data.media_root alone while a run reads it")
    return made


def regrouped(parts: Iterator[Frames], num_frames: int) -> Iterator[Frames]:
    """The same frames in parts of `num_frames`, the last one perhaps smaller."""
    waiting: list[torch.Tensor] = []
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
