"""Qwen with fewer tokens for a video, written plainly around transformers' own model: the oracle of pooling."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from longrl.testing.plain_forward import qwen_media_inputs, stock_model
from longrl.types import Prompt


def media_inputs(prompt: Prompt) -> dict[str, Any]:
    """As of any Qwen, but that the grid of a video counts what the encoder reads: its patches, not the pools."""
    inputs = qwen_media_inputs(prompt)
    videos = [item for item in prompt.media if item.kind == "video"]
    if videos:
        sides = [item.grid_thw[1:] for item in videos]
        grids = [(len(item.patches) // (h * w), h, w) for item, (h, w) in zip(videos, sides, strict=True)]
        inputs["video_grid_thw"] = torch.tensor(grids)
    return inputs


def pooled_rows(rows: Tensor, grid: tuple[int, int, int], time: int, space: int) -> Tensor:
    """One mean after the other, of [T * H * W, D]."""
    shape = (-(-grid[0] // time), -(-grid[1] // space), -(-grid[2] // space))
    cube = rows.view(*grid, -1)
    means = []
    for t, y, x in itertools.product(*map(range, shape)):
        block = cube[t * time : (t + 1) * time, y * space : (y + 1) * space, x * space : (x + 1) * space]
        means.append(sum(block.flatten(0, 2)) / (block.shape[0] * block.shape[1] * block.shape[2]))
    return torch.stack(means)


def pooled_model(model: nn.Module, family: Any) -> nn.Module:
    """transformers' model with the same weights, whose videos' features are averaged where it takes them up."""
    plain = stock_model(model, family)
    holder = plain.model if hasattr(plain.model, "get_video_features") else plain
    encode = holder.get_video_features
    pool = (family.temporal_pool or 1, family.spatial_pool or 1)
    merge = family.config.vision_config.spatial_merge_size

    def get_video_features(patches: Tensor, grids: Tensor, **options: Any) -> Any:
        output = encode(patches, grids, **options)
        shapes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
        lengths = [t * h * w for t, h, w in shapes]

        def pooled(parts: Any) -> tuple[Tensor, ...]:
            parts = torch.cat(parts).split(lengths) if not isinstance(parts, Tensor) else parts.split(lengths)
            return tuple(pooled_rows(part, shape, *pool) for part, shape in zip(parts, shapes, strict=True))

        output.pooler_output = pooled(output.pooler_output)
        if getattr(output, "deepstack_features", None):
            output.deepstack_features = [pooled(level) for level in output.deepstack_features]
        return output

    holder.get_video_features = get_video_features
    return plain
