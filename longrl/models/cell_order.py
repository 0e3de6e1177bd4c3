"""Videos whose temporal patches ("cells") are shown in another order: the same features, block by block elsewhere.

An encoder reads every cell on its own (ranks share a video by cells), so the features of reordered frames are the rows
of the features in order, and nothing is encoded twice. Placeholders, positions, timestamps and other text stay where
they are; images and sounds, a video's own track among them, stay as they are.

Letters: N rows of features, D feature size.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from longrl.models.patching import PatchesMedia
from longrl.types import Media, Prompt


def cell_order(num_cells: int, seed: str) -> tuple[int, ...]:
    """A permutation of so many cells, the same on every machine: never the one in order, if there is another.

    Args:
        num_cells: of a video.
        seed: whatever names the permutation.

    Example:
        `cell_order(3, "a")` is `(1, 0, 2)`: first the second cell, then the first.
    """
    cells = range(num_cells)
    draw = 0
    while True:
        drawn = [hashlib.sha256(f"{seed}/{draw}/{cell}".encode()).digest() for cell in cells]
        order = tuple(sorted(cells, key=drawn.__getitem__))
        if num_cells < 2 or order != tuple(cells):
            return order
        draw += 1


def shuffled_prompt(family: PatchesMedia, prompt: Prompt, seed: str) -> Prompt | None:
    """The prompt with the cells of its videos in another order; None if there is none: no video has two cells.

    Its media have keys of their own, by which caches and engines tell them from those in order.

    Args:
        family: that rendered it.
        prompt: with its videos in order.
        seed: decides the order, together with a video's place in the prompt.

    Raises:
        ValueError: the rows of a video's features are not those of its cells.
    """
    media = []
    for index, item in enumerate(prompt.media):
        num_cells = item.grid_thw[0]
        if item.kind == "video" and num_cells > 1:
            _check_cells(family, item)
            item = reordered(item, cell_order(num_cells, f"{seed}/{index}"))
        media.append(item)
    if not any(item.cell_order for item in media):
        return None
    return replace(prompt, media=tuple(media))


def reordered(item: Media, order: tuple[int, ...]) -> Media:
    """A video with its cells in another order: at place i stands cell order[i]."""
    digest = hashlib.sha256(repr(order).encode()).hexdigest()[:16]
    return replace(item, key=f"{item.key}-order-{digest}", cell_order=order, key_in_order=item.key)


def in_order(item: Media) -> Media:
    """The media item whose features are encoded: itself, or the one that it shows in another order."""
    return replace(item, key=item.key_in_order, cell_order=(), key_in_order="") if item.cell_order else item


def reordered_rows(item: Media, rows: Tensor) -> Tensor:
    """[N, D] features of a reordered media item.

    Args:
        item: `reordered`.
        rows: [N, D] of the same in order; every row may have several levels (DeepStack), which stay together.
    """
    cells = rows.unflatten(0, (len(item.cell_order), -1))  # [cells, N / cells, D]
    order = torch.tensor(item.cell_order, device=rows.device)
    return cells[order].flatten(0, 1)


def _check_cells(family: PatchesMedia, item: Media) -> None:
    rows = family.num_features(item)
    rows_of_cell = family.num_features(item.part(1))
    if not family.has_even_patches:
        raise ValueError(
            f"frames can be shuffled where every temporal patch has as many rows of features, but those of "
            f"{type(family).__name__} differ with model.family.init_args.max_kept_tokens; leave that out, or "
            "data.shuffle_frames, --shuffled_baseline and rollout.frame_order"
        )
    if rows != item.grid_thw[0] * rows_of_cell:
        raise ValueError(
            f"frames can be shuffled where a video's features are those of its temporal patches one after the other, "
            f"but {type(family).__name__} has {rows} rows for {item.grid_thw[0]} patches of {rows_of_cell}; leave "
            "data.shuffle_frames, --shuffled_baseline and rollout.frame_order out with this family"
        )
