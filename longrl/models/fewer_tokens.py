"""`FewerTokens`: what a Qwen with an image encoder does to have fewer tokens for a video than its encoder gives.

Pooling averages neighbours (longrl/models/feature_pooling.py); merging keeps a fixed number of tokens of each video
(longrl/models/token_merging.py), of what pooling leaves. Both are of videos alone. The temporal patches that
`Media.grid_thw` counts, by which ranks share a video, are then pools of the encoder's, or windows of such pools.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from longrl.io.number_ranges import COUNT, MOST, check_ranges
from longrl.models.feature_pooling import FeaturePooling
from longrl.models.mrope import PositionBlock, grid_positions
from longrl.models.patching import GridTHW, times_of_patches
from longrl.models.processor_family import ProcessorFamily
from longrl.models.reading import RendersPrompts
from longrl.models.token_merging import PLACE_COLUMNS, TokenMerging, without_places
from longrl.types import Media, Prompt

logger = logging.getLogger(__name__)
VLLM_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Models that `longrl.models.qwen_vl_vllm` has a class of."""
WINDOW = 8
"""Temporal patches of a window where nothing else is said."""


class FewerTokens(ProcessorFamily):
    """A Qwen whose videos may have fewer tokens.

    Args:
        model: folder or hub id.
        temporal_pool: temporal patches of a video (two frames each) whose features are averaged into one; None is 1.
        spatial_pool: side of the square of a frame's features that are averaged into one; None is 1.
        max_kept_tokens: tokens of a video that remain, at most: features that hardly differ from those before them are
            merged with these. None is all.
        merge_window: temporal patches, behind pooling, of which the first keeps all its features; None is 8.
        kwargs: see `CausalFamily`.
    """

    later_options = (
        *RendersPrompts.later_options, "temporal_pool", "spatial_pool", "max_kept_tokens", "merge_window",
    )  # fmt: skip
    merges_tokens: ClassVar[bool] = True
    """False of a family whose videos stand in the prompt among other things, so that no token may go."""

    def __init__(
        self,
        model: str,
        temporal_pool: int | None = None,
        spatial_pool: int | None = None,
        max_kept_tokens: int | None = None,
        merge_window: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        counts = ("temporal_pool", "spatial_pool", "max_kept_tokens")
        check_ranges(locals(), "model.family.init_args.", **dict.fromkeys(counts, COUNT), merge_window=(2, MOST))
        if max_kept_tokens is not None and not self.merges_tokens:
            raise ValueError(
                f"model.family.init_args.max_kept_tokens={max_kept_tokens} is not for {type(self).__name__}, whose "
                "videos stand among sound; use temporal_pool and spatial_pool"
            )
        if merge_window is not None and max_kept_tokens is None:
            logger.warning("model.family.init_args.merge_window has no effect without max_kept_tokens; set that too")
        self.temporal_pool = temporal_pool
        self.spatial_pool = spatial_pool
        self.max_kept_tokens = max_kept_tokens
        self.merge_window = merge_window
        self.pooling = FeaturePooling(temporal_pool or 1, spatial_pool or 1)
        self.merging = None if max_kept_tokens is None else TokenMerging(max_kept_tokens, merge_window or WINDOW)

    # -- what stays together -------------------------------------------------------------------------------------

    @property
    def frames_per_patch(self) -> int:
        """Frames that the encoder itself reads as one temporal patch."""
        return self.config.vision_config.temporal_patch_size

    @property
    def frames_per_pool(self) -> int:
        """Frames of what is a temporal patch to the text stack."""
        return self.frames_per_patch * self.pooling.time

    @property
    @override
    def temporal_patch_size(self) -> int:
        return self.frames_per_pool * (self.merging.window if self.merging else 1)

    @property
    @override
    def has_even_patches(self) -> bool:
        return self.merging is None

    @override
    def outline_media(self, frames: Any) -> Media:
        item = super().outline_media(frames)
        if self.merging is None or item.kind != "video":
            return item
        times, seconds = times_of_patches(frames.timestamps, self.frames_per_pool)
        item = replace(item, timestamps=times, seconds_per_temporal_patch=seconds)
        self.rows_of_patches(item)  # a video that does not fit is refused here, by the loader
        return item

    @override
    def encoded_patches(self, media: Media) -> int:
        """Those of pooled features count each, and a last pool as full: an item does not say how many frames it has.

        For a short video that is too many: with `temporal_pool` 3 nine temporal patches of 14 frames, not seven.
        """
        _, height, width = media.grid_thw
        pools = self._num_pools(media) * self.pooling.time if media.kind == "video" else 1
        return pools * height * width

    # -- tokens --------------------------------------------------------------------------------------------------

    def coarse(self, media: Media) -> Media:
        """The item with the grid that positions and engines know: as if the encoder gave the pooled features itself."""
        return self.pooling.coarse(media, self.config.vision_config.spatial_merge_size)

    @override
    def num_features(self, media: Media) -> int:
        """Tokens of an image or video behind the encoder's spatial merge, behind pooling and merging."""
        return sum(self.rows_of_patches(media))

    def rows_of_patches(self, media: Media) -> list[int]:
        """Tokens of each temporal patch, of each pool of them."""
        merge = self.config.vision_config.spatial_merge_size
        time, height, width = self.coarse(media).grid_thw
        sides = (height // merge, width // merge)
        if self.merging is None or media.kind != "video":
            return [math.prod(sides)] * time
        return self.merging.rows_of_patches(len(media.timestamps), sides)[: self._num_pools(media)]

    def _num_pools(self, media: Media) -> int:
        """Temporal patches of a video, or of the first part of it, as the text stack reads them."""
        if self.merging is None:
            return media.grid_thw[0]
        return min(media.grid_thw[0] * self.merging.window, len(media.timestamps))

    def position_block(self, media: Media, step: float) -> PositionBlock:
        """Positions of an item's tokens from 0 on, and where the text behind it goes on.

        Of a video whose tokens are merged text goes on where it would behind all of them, and they themselves are
        further along height and width by the places that come with their features.

        Args:
            media: an image or video.
            step: positions from one temporal patch to the next.
        """
        merge = self.config.vision_config.spatial_merge_size
        coarse = self.coarse(media)
        if self.merging is None or media.kind != "video":
            grid = grid_positions(coarse, merge, step)
            return PositionBlock(grid, int(grid.max()) + 1)
        rows = self.rows_of_patches(media)
        _, height, width = coarse.grid_thw
        grid = grid_positions(replace(coarse, grid_thw=(len(rows), height, width)), merge, step)
        of_patches = grid.view(3, len(rows), -1)[0, :, 0]
        times = of_patches.repeat_interleave(torch.tensor(rows))
        return PositionBlock(torch.stack([times, *[torch.zeros_like(times)] * 2]), int(grid.max()) + 1)

    # -- features ------------------------------------------------------------------------------------------------

    @property
    @override
    def feature_size(self) -> int:
        return self.read_size + (PLACE_COLUMNS if self.merging else 0)

    @property
    def read_size(self) -> int:
        """Columns of features that the text stack reads."""
        return super().feature_size

    @override
    def encoder_settings(self) -> dict[str, Any]:
        """Those of pooling and merging, where there are any."""
        settings: dict[str, Any] = {}
        if self.pooling != FeaturePooling():
            settings["pooling"] = asdict(self.pooling)
        if self.merging is not None:
            settings["merging"] = asdict(self.merging)
        return settings

    def reduced(self, media: Media, rows: Tensor, grid: GridTHW) -> Tensor:
        """What remains of the features of an image or video.

        Args:
            media: whose it is, or this rank's part of it.
            rows: [T * H * W, D] as the encoder gives them.
            grid: T, H and W.
        """
        if media.kind != "video":
            return rows if self.merging is None else F.pad(rows, (0, PLACE_COLUMNS))
        rows = self.pooling.average(rows, grid)
        if self.merging is None:
            return rows
        time, height, width = grid
        pooled = (-(-time // self.pooling.time), -(-height // self.pooling.space), -(-width // self.pooling.space))
        kept = self.merging.rows_of_patches(len(media.timestamps), pooled[1:])
        compared = self.config.get_text_config().hidden_size
        return self.merging.merge(rows, pooled, kept[1] if len(kept) > 1 else 0, compared)

    @override
    def rows_and_offsets(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.merging is None:
            return rows, None
        rows, places = without_places(rows)
        return rows, F.pad(places, (self.num_axes - PLACE_COLUMNS, 0))  # time, height, width

    # -- rollout engines -----------------------------------------------------------------------------------------

    def merging_options(self) -> dict[str, Any]:
        """Options of a vLLM that takes positions with features, for it counts its own by a video's whole grid.

        Raises:
            ValueError: there is no class of this model that does.
        """
        if self.config.model_type not in VLLM_TYPES:
            raise ValueError(
                f"vLLM counts the positions of a video of {self.config.model_type} by its whole grid, and with "
                f"model.family.init_args.max_kept_tokens={self.max_kept_tokens} not every token is there; use engine: "
                "longrl.engines.hf.HFEngine, or temporal_pool and spatial_pool in the place of max_kept_tokens"
            )
        from longrl.models.qwen_vl_vllm import as_features

        limits = dict.fromkeys(("image", "video"), 0)  # of other media: no encoder is built, and none is measured
        return {"enable_mm_embeds": True, "limit_mm_per_prompt": limits, "hf_overrides": as_features}

    @override
    def as_read(
        self, prompts: Sequence[Prompt], features: Mapping[str, Tensor]
    ) -> tuple[Sequence[Prompt], Mapping[str, Tensor]]:
        if self.merging is None:
            return prompts, features
        placed: list[Prompt] = []
        rows: dict[str, Tensor] = {}
        for prompt in prompts:
            positions = prompt.position_ids.clone()
            for kind, token in self.media_token_ids().items():
                offsets = [torch.zeros(0, self.num_axes, dtype=torch.int64)]
                for item in prompt.media:
                    if item.kind == kind:
                        rows[item.key], places = self.rows_and_offsets(features[item.key])
                        assert places is not None, "tokens are merged"
                        offsets.append(places.cpu())
                positions[:, prompt.input_ids == token] += torch.cat(offsets).T
            placed.append(replace(prompt, position_ids=positions))
        return placed, rows
