"""Means over neighbouring features of a video behind its encoder, in time and in space.

T x H x W features, D columns each; a pool takes so many along an axis, and at an edge what is left. VILA's
TSPVideoEncoder (longrl/models/vila.py) averages likewise, but repeats the last frame to fill a pool.

A video whose features are pooled is to the text stack what one with fewer and smaller frames would be. Its grid counts
pools; a pooled temporal patch has the mean time of its frames, in Qwen3-VL's words too, and stands where its first one
did; positions along height and width count pools, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrl.models.patching import GridTHW
from longrl.types import Media


@dataclass(frozen=True)
class FeaturePooling:
    """How many neighbours become one feature.

    Example:
        `FeaturePooling(time=2, space=2)` leaves about an eighth.
    """

    time: int = 1
    """Temporal patches."""
    space: int = 1
    """Features along height, and along width."""

    def coarse(self, media: Media, merge_size: int) -> Media:
        """The item as if its encoder had the grid of what is left: a video's height and width count pools.

        Along time its grid counts pools anyway, for ranks share a video by them.

        Args:
            media: an image, which is not pooled, or a video.
            merge_size: patches along a side of one feature of the encoder.
        """
        if media.kind != "video" or self.space == 1:
            return media
        time, *sides = media.grid_thw
        height, width = (-(-side // (merge_size * self.space)) * merge_size for side in sides)
        return replace(media, grid_thw=(time, height, width))

    def average(self, rows: Tensor, grid: GridTHW) -> Tensor:
        """Means over the pools.

        Args:
            rows: [T * H * W, D] features of a video, or of whole pools of its temporal patches.
            grid: T, H and W.

        Returns:
            [number of pools, D], in the same order: time, height, width.
        """
        if self == FeaturePooling():
            return rows
        # Rounded to the features' precision once.
        precise = rows.to(torch.promote_types(rows.dtype, torch.float32)).view(*grid, -1)
        for dim, size in enumerate((self.time, self.space, self.space)):
            precise = _averaged(precise, dim, size)
        return precise.flatten(0, 2).to(rows.dtype)


def _averaged(values: Tensor, dim: int, size: int) -> Tensor:
    """Means of neighbours along a dimension, the last one of those that are left."""
    if size == 1:
        return values
    length = values.shape[dim]
    full = length // size
    parts = []
    if full:
        parts.append(values.narrow(dim, 0, full * size).unflatten(dim, (full, size)).mean(dim + 1))
    if full * size < length:
        parts.append(values.narrow(dim, full * size, length - full * size).mean(dim, keepdim=True))
    return torch.cat(parts, dim)
