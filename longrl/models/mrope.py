"""M-RoPE: time, height and width position of every token of a prompt (arXiv:2409.12191, section 2.1).

As Qwen2.5-VL's released code and vLLM count them: text advances by one on all axes; a media item starts where the text
stopped, and its time axis runs by seconds, truncated to integers; text goes on at the largest position used so far plus
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longrl.types import Media


class PositionBlock(NamedTuple):
    """Positions of the placeholders of a media item, or of a piece of one that text is around."""

    grid: Tensor
    """[3, n] int64, from 0 on."""
    reach: int
    """Where the text behind it goes on, from 0 on."""


def place_blocks(input_ids: Tensor, blocks: Sequence[PositionBlock], media_tokens: set[int]) -> Tensor:
    """Time, height and width position of every token of a prompt.

    Args:
        input_ids: [T] with media placeholders expanded.
        blocks: of the media, in the order of their placeholders.
        media_tokens: ids of placeholder tokens.

    Returns:
        [3, T] int64.
    """
    is_media = torch.isin(input_ids, torch.tensor(sorted(media_tokens)))
    placeholders = is_media.nonzero()[:, 0].tolist()
    parts = []
    start = 0  # position of the next token
    token = 0  # its index
    seen = 0  # placeholders behind us
    for grid, reach in blocks:
        num_text = placeholders[seen] - token
        parts.append(torch.arange(start, start + num_text).expand(3, -1))
        start += num_text
        parts.append(grid + start)
        seen += grid.shape[1]
        token += num_text + grid.shape[1]
        start += reach
    parts.append(torch.arange(start, start + len(input_ids) - token).expand(3, -1))
    return torch.cat(parts, dim=1)


def grid_positions(media: Media, merge_size: int, step: float) -> Tensor:
    """[3, N] time, height and width of a media item's features, from 0 on.

    Args:
        media: an image or video.
        merge_size: patches merged along height and width.
        step: positions from one temporal patch to the next.
    """
    num_times, height, width = media.grid_thw
    # In float64, as vLLM: in float32 a product that is a hair below an integer would become that integer.
    time = (torch.arange(num_times, dtype=torch.float64) * step).long()
    axes = time, torch.arange(height // merge_size), torch.arange(width // merge_size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)
