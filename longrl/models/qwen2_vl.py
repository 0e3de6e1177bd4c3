"""Qwen2-VL (arXiv:2409.12191): Qwen2.5-VL without windows in its encoder, and without seconds in its positions.

Of its vision config other fields are the encoder's width (`embed_dim`, where `hidden_size` is the text stack's) and its
MLP's. A video's temporal patches stand one position apart, however many seconds lie between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from longrl.models.base import CausalFamily
from longrl.models.mrope import place_blocks
from longrl.models.planning_sizes import TextSizes, VisionSizes
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import Media


class Qwen2VLFamily(Qwen2_5_VLFamily):
    """Qwen2-VL of any size.

    Args:
        model: folder or hub id.
        kwargs: see `Qwen2_5_VLFamily`.

    Example:
        `Qwen2VLFamily(model="Qwen/Qwen2-VL-7B-Instruct", dtype="bfloat16", max_pixels=128 * 28 * 28)`
    """

    model_types = ("qwen2_vl",)

    @override
    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        blocks = [self.position_block(item, step=1) for item in media]
        return place_blocks(input_ids, blocks, set(self.media_token_ids().values()))

    @override
    def planning_sizes(self) -> tuple[TextSizes, VisionSizes | None]:
        vision = self.config.vision_config
        encoder = VisionSizes(
            width=vision.embed_dim,
            mlp_width=vision.mlp_ratio * vision.embed_dim,
            num_layers=vision.depth,
            num_full_layers=vision.depth,
            window_patches=0,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size**2,
            frames_per_patch=self.frames_per_patch,
        )
        return CausalFamily.planning_sizes(self)[0], encoder

    @override
    def engine_times(self, videos: Sequence[Media]) -> dict[str, Any]:
        return {}  # vLLM takes none of this model's, and counts as above
