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
    """transformers' model with the same weights, whose videos' features are averaged where it takes them up.

    And merged, if the family does that: then those that are kept stand at their own heights and widths.
    """
    plain = stock_model(model, family)
    holder = plain.model if hasattr(plain.model, "get_video_features") else plain
    encode = holder.get_video_features
    pool = (family.temporal_pool or 1, family.spatial_pool or 1)
    merge = family.config.vision_config.spatial_merge_size

    places: list[Tensor] = []

    def get_video_features(patches: Tensor, grids: Tensor, **options: Any) -> Any:
        output = encode(patches, grids, **options)
        shapes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
        lengths = [t * h * w for t, h, w in shapes]

        def pooled(parts: Any) -> tuple[Tensor, ...]:
            parts = torch.cat(parts).split(lengths) if not isinstance(parts, Tensor) else parts.split(lengths)
            return tuple(pooled_rows(part, shape, *pool) for part, shape in zip(parts, shapes, strict=True))

        levels = [pooled(output.pooler_output)]
        levels += [pooled(level) for level in getattr(output, "deepstack_features", None) or ()]
        if family.merging is not None:
            places.clear()
            merged = []
            for index, (t, h, w) in enumerate(shapes):
                shape = (-(-t // pool[0]), -(-h // pool[1]), -(-w // pool[1]))
                values, where = merged_rows([level[index] for level in levels], shape, family)
                merged.append(values)
                places.append(where)
            levels = [tuple(of_video) for of_video in zip(*merged, strict=True)]
        output.pooler_output, *deeper = levels
        if deeper:
            output.deepstack_features = deeper
        return output

    def note_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        places.clear()
        module.is_video = kwargs["input_ids"][0] == family.media_token_ids()["video"]

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs["position_ids"].clone()
        if places:
            positions[-2:, 0, plain.is_video] += torch.cat(places).T
        return args, kwargs | {"position_ids": positions}

    holder.get_video_features = get_video_features
    if family.merging is not None:
        plain.register_forward_pre_hook(note_ids, with_kwargs=True)
        holder.language_model.register_forward_pre_hook(move, with_kwargs=True)
    return plain


def merged_rows(levels: list[Tensor], grid: tuple[int, int, int], family: Any) -> tuple[list[Tensor], Tensor]:
    """Of each level, [T * H * W, D], what remains of a whole video; and its places, [rows, 2]."""
    num_times, height, width = grid
    size, window, budget = height * width, family.merge_window or 8, family.max_kept_tokens
    anchors = range(0, num_times, window)
    share = min(size, (budget - len(anchors) * size) // max(1, num_times - len(anchors)))
    cubes = [level.view(num_times, size, -1) for level in levels]
    runs: list[tuple[int, list[int]]] = []  # place, and the times that are one
    for first in anchors:
        open_run = {}
        for time in range(first, min(first + window, num_times)):
            if time == first:
                kept = list(range(size))
            else:
                now, before = cubes[0][time].detach(), cubes[0][time - 1].detach()
                change = [1 - float(nn.functional.cosine_similarity(now[i], before[i], dim=0)) for i in range(size)]
                kept = sorted(sorted(range(size), key=lambda i: -change[i])[:share])
            for place in range(size):
                if place in kept:
                    open_run[place] = []
                    runs.append((place, open_run[place]))
                open_run[place].append(time)
    values = [torch.stack([sum(cube[t, place] for t in times) / len(times) for place, times in runs]) for cube in cubes]
    return values, torch.tensor([divmod(place, width) for place, _ in runs])
