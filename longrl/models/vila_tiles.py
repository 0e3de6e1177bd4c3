"""Frames and images at the encoder's size, as NVILA's released code cuts them (arXiv:2412.04468, section 2.1).

All resizing is Pillow's bicubic one on uint8 pixels, so that patches equal the released ones bit by bit. Letters: F
frames, S pixels along the encoder's square image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def resize_frames(pixels: Tensor, width: int, height: int) -> Tensor:
    """[F, 3, H, W] uint8 -> [F, 3, height, width] uint8."""
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    import numpy as np
    from PIL import Image

    resized = []
    for frame in pixels:
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy())
        array = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        resized.append(torch.from_numpy(array).permute(2, 0, 1).contiguous())
    return torch.stack(resized)


def tile_grid(height: int, width: int, size: int, *, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of tiles whose aspect ratio is nearest to that of the image.

    Among equally near grids a larger one is taken if the image has more than half its pixels. The released code leaves
    the order of grids with equal area to a set; it matters to no image with `min_tiles` 1, nor with 9 to 12 tiles.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        size: S.
        min_tiles: the fewest.
        max_tiles: the most.
    """
    pairs = itertools.product(range(1, max_tiles + 1), repeat=2)
    grids = [grid for grid in pairs if min_tiles <= grid[0] * grid[1] <= max_tiles]
    nearest, best = float("inf"), (1, 1)
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * size * size * rows * columns
        if distance < nearest or (distance == nearest and large_enough):
            nearest, best = distance, (rows, columns)
    return best


def cut_tiles(image: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """[1, 3, H, W] -> [rows * columns, 3, S, S], row after row."""
    resized = resize_frames(image, columns * size, rows * size)[0]
    return resized.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).flatten(0, 1)


def with_thumbnail(image: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """`image_aspect_ratio: dynamic`: the tiles, and all of the image behind them if there is more than one."""
    parts = [cut_tiles(image, rows, columns, size)]
    if rows * columns > 1:
        parts.append(resize_frames(image, size, size))
    return torch.cat(parts)


def with_scales(image: Tensor, rows: int, columns: int, size: int, scales: Sequence[int]) -> Tensor:
    """`image_aspect_ratio: dynamic_s2`: squares of all scales but the last, then rows x columns tiles."""
    squares = [scale // scales[0] for scale in scales[:-1]]
    return torch.cat([*(cut_tiles(image, side, side, size) for side in squares), cut_tiles(image, rows, columns, size)])
