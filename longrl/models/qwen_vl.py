"""Qwen2.5-VL (arXiv:2502.13923): images and videos through a windowed vision transformer, M-RoPE positions.

The family computes positions itself. Qwen's released code and vLLM go on after a media item at the largest position
used so far plus one; transformers 5.19 goes on at max(h, w) only, which is another model after nearly every video.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.io.number_ranges import COUNT, check_ranges
from longrl.models.building import OWN_WEIGHTS
from longrl.models.fewer_tokens import FewerTokens
from longrl.models.mrope import place_blocks
from longrl.models.patching import GridTHW
from longrl.models.planning_sizes import TextSizes, VisionSizes
from longrl.models.positioned_request import positioned_request
from longrl.types import Frames, Media, MediaKind, Prompt


class Qwen2_5_VLFamily(FewerTokens):
    """Qwen2.5-VL of any size.

    Args:
        model: folder or hub id.
        min_pixels: a frame or image is enlarged to at least this many pixels.
        max_pixels: a frame or image is shrunk to at most this many pixels.
        max_video_pixels: budget over all frames of a video; long videos get smaller frames, down to `min_pixels`. The
            frames of a temporal patch count each: it is twice the `total_pixels` of qwen-vl-utils.
        max_video_tokens: the same budget in tokens, in the place of `max_video_pixels`; as Qwen counts, the two frames
            of a temporal patch are one. Behind pooling, but for the edges that a pool does not fill.
        freeze_vision_encoder: leave the vision encoder as it is; its features are then encoded once per step, without
            gradient.
        max_patches_per_encode: patches the encoder reads in one call, which bounds its memory.
        kwargs: see `FewerTokens` and `CausalFamily`.

    Example:
        `Qwen2_5_VLFamily(model="Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16", max_pixels=128 * 28 * 28)`
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    num_axes = 3
    # The encoder rounds by the size of a call, so the last one counts too.
    answer_options: ClassVar[tuple[str, ...]] = (
        "min_pixels", "max_pixels", "max_video_pixels", "max_video_tokens", "max_patches_per_encode",
    )  # fmt: skip
    training_options: ClassVar[tuple[str, ...]] = ("freeze_vision_encoder",)
    media_enter_whole = True
    encoder_configs: ClassVar[tuple[str, ...]] = ("vision_config",)
    """Sub-configs of the encoders whose sequences lie end to end: each layer attends in one call."""

    def __init__(
        self,
        model: str,
        min_pixels: int = 4 * 28 * 28,
        max_pixels: int = 128 * 28 * 28,
        max_video_pixels: int = 115_200 * 28 * 28,
        freeze_vision_encoder: bool = True,
        max_patches_per_encode: int = 1 << 16,
        max_video_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_ranges(locals(), "model.family.init_args.", max_video_pixels=COUNT, max_patches_per_encode=COUNT)
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"min_pixels={min_pixels} must be positive and at most max_pixels={max_pixels}")
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        if max_video_tokens is not None and max_video_tokens < 1:
            raise ValueError(
                f"model.family.init_args.max_video_tokens must be at least 1, got {max_video_tokens}; Qwen3-VL's is "
                "229376, null leaves the budget to max_video_pixels"
            )
        self.max_video_pixels = max_video_pixels
        self.max_video_tokens = max_video_tokens
        self.freeze_vision_encoder = freeze_vision_encoder
        self.max_patches_per_encode = max_patches_per_encode

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def attn_implementation(self) -> dict[str, str]:
        return {"text_config": str(super().attn_implementation()), **dict.fromkeys(self.encoder_configs, "sdpa")}

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        from longrl.packing.encoder_attention import ENCODER_ATTENTION_NAME

        model = super().build(weights)
        # Not when it is built: a name with "flash" in it would then be looked for among the kernels of the hub.
        model.set_attn_implementation(dict.fromkeys(self.encoder_configs, ENCODER_ATTENTION_NAME))
        self.media_encoders(model)[0].requires_grad_(not self.freeze_vision_encoder)
        return model

    # -- pixels --------------------------------------------------------------------------------------------------

    @override
    def temporal_patches_per_encode(self, media: Media) -> int:
        return max(1, self.max_patches_per_encode // self.encoded_patches(media.part(1)))

    @override
    def grid(
        self, num_frames: int, height: int, width: int, *, kind: MediaKind = "video", resized: bool = False
    ) -> GridTHW:
        processor = self.processor.image_processor if kind == "image" else self.processor.video_processor
        if not resized:
            height, width = self.frame_size(num_frames, height, width, kind)
        temporal_patches = -(-num_frames // self.temporal_patch_size)
        return temporal_patches, height // processor.patch_size, width // processor.patch_size

    def frame_size(self, num_frames: int, height: int, width: int, kind: MediaKind = "video") -> tuple[int, int]:
        """Height and width in pixels to which the model's own processor resizes an image or a video's frames."""
        processor = self.processor.image_processor if kind == "image" else self.processor.video_processor
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        max_pixels = self.max_pixels
        if kind == "video":  # the limit of a frame that keeps all of them within their budget
            max_pixels = max(self.min_pixels, min(max_pixels, self.video_pixels() // num_frames))
        factor = processor.patch_size * processor.merge_size
        return smart_resize(height, width, factor, min_pixels=self.min_pixels, max_pixels=max_pixels)

    def video_pixels(self) -> int:
        """The budget over all frames of a video, each counted: `max_video_tokens` in pixels, or `max_video_pixels`."""
        if self.max_video_tokens is None:
            return self.max_video_pixels
        processor = self.processor.video_processor
        side = processor.patch_size * processor.merge_size * self.pooling.space
        return self.max_video_tokens * side**2 * self.frames_per_pool

    @override
    def resize(self, frames: Frames) -> Frames:
        if frames.kind == "image" or frames.resized:
            return frames
        processor = self.processor.video_processor
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        height, width = frames.pixels.shape[-2:]
        height, width = self.frame_size(len(frames.timestamps), height, width)
        # The base class resizes to a given size; a processor's own `resize` would count the frames that are here.
        pixels = BaseVideoProcessor.resize(
            processor, frames.pixels, size=SizeDict(height=height, width=width), resample=processor.resample
        )
        return replace(frames, pixels=pixels, resized=True)

    @override
    def pixel_patches(self, frames: Frames) -> Tensor:
        if frames.kind == "image":
            size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
            result = self.processor.image_processor(list(frames.pixels), size=size, return_tensors="pt")
            return result["pixel_values"]
        result = self.processor.video_processor(
            [self.resize(frames).pixels],
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        return result["pixel_values_videos"]

    # -- prompts -------------------------------------------------------------------------------------------------

    @override
    def media_token_ids(self) -> dict[str, int]:
        return {"image": self.config.image_token_id, "video": self.config.video_token_id}

    @override
    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        rate = self.config.vision_config.tokens_per_second
        blocks = [self.position_block(item, item.seconds_per_temporal_patch * rate) for item in media]
        return place_blocks(input_ids, blocks, set(self.media_token_ids().values()))

    # -- features ------------------------------------------------------------------------------------------------

    @override
    def media_encoders(self, model: Any) -> tuple[nn.Module, ...]:
        return (model.model.visual,)

    @override
    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        visual = self.media_encoders(model)[0]
        levels = getattr(visual, "deepstack_merger_list", ())  # Qwen3-VL's
        return (visual.merger, *levels)

    @property
    @override
    def read_size(self) -> int:
        levels = getattr(self.config.vision_config, "deepstack_visual_indexes", ())  # Qwen3-VL's
        return super().read_size * (1 + len(levels))

    @override
    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings() | {
            "image_processor": self.processor.image_processor.to_dict(),
            "video_processor": self.processor.video_processor.to_dict(),
            "vision_config": structure_of(self.config.vision_config),
        }

    @override
    def encode_media(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] features. The encoder attends within a temporal patch, so joint calls change nothing."""
        # Calls of at most so many patches; a larger media item has one of its own.
        calls: list[list[Media]] = []
        room = 0
        for item in media:
            if len(item.patches) > room:
                calls.append([])
                room = self.max_patches_per_encode
            calls[-1].append(item)
            room -= len(item.patches)

        encoder: Any = self.media_encoders(model)[0]
        features: list[Tensor] = []
        for call in calls:
            parts = [item.patches.to(encoder.device, encoder.dtype, non_blocking=True) for item in call]
            patches = torch.cat(parts) if len(parts) > 1 else parts[0]
            grids = [self._encoded_grid(item) for item in call]
            output = encoder(patches, grid_thw=torch.tensor(grids, device=encoder.device), return_dict=True)
            rows = output.pooler_output  # [N, D]
            levels = getattr(output, "deepstack_features", None)
            if levels:  # Qwen3-VL's
                rows = torch.cat([rows, *levels], -1)
            merge = self.config.vision_config.spatial_merge_size
            shapes = [(time, height // merge, width // merge) for time, height, width in grids]
            parts = rows.split([math.prod(shape) for shape in shapes])
            for item, part, shape in zip(call, parts, shapes, strict=True):
                features.append(self.reduced(item, part, shape))
        return features

    def _encoded_grid(self, media: Media) -> GridTHW:
        """The grid of the patches that are here: of a video temporal patches, the last of which may fill no pool."""
        _, height, width = media.grid_thw
        return len(media.patches) // (height * width), height, width

    @override
    def planning_sizes(self) -> tuple[TextSizes, VisionSizes | None]:
        vision = self.config.vision_config
        windowed = hasattr(vision, "window_size")
        encoder = VisionSizes(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            num_layers=vision.depth,
            num_full_layers=len(vision.fullatt_block_indexes) if windowed else vision.depth,
            window_patches=(vision.window_size // vision.patch_size) ** 2 if windowed else 0,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size**2,
            frames_per_patch=self.frames_per_patch,
        )
        return super().planning_sizes()[0], encoder

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        if self.merging is not None:
            return self.merging_options()
        # No media but features: vLLM builds no vision encoder, and measures none.
        return {"enable_mm_embeds": True, "limit_mm_per_prompt": dict.fromkeys(("image", "video"), 0)}

    @override
    def engine_weight(self, name: str) -> str | None:
        return None if name.startswith("model.visual.") else name

    @override
    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """One placeholder per media item, and the features in its place; vLLM computes positions from grids and times.

        vLLM keeps features by the ids given here; what they are made of is in the media's keys.
        """
        if self.merging is not None:
            (placed,), rows = self.as_read([prompt], features)
            return positioned_request(self.media_token_ids(), placed, rows)
        data: dict[str, dict[str, Any]] = {}
        names: dict[str, list[str]] = {}
        for kind in ("image", "video"):
            media = [item for item in prompt.media if item.kind == kind]
            if not media:
                continue
            embeds = torch.cat([features[item.key] for item in media])
            grids = torch.tensor([self.coarse(item).grid_thw for item in media])
            data[kind] = {f"{kind}_embeds": embeds, f"{kind}_grid_thw": grids}
            if kind == "video":
                data[kind] |= self.engine_times(media)
            names[kind] = []
            for item in media:  # tells apart all that the model reads differently: features, and times
                times = repr((item.seconds_per_temporal_patch, item.timestamps))
                names[kind].append(f"{item.key}|{hashlib.sha256(times.encode()).hexdigest()[:16]}")
        request: dict[str, Any] = {"prompt_token_ids": self._compact(prompt)}
        return request | ({"multi_modal_data": data, "multi_modal_uuids": names} if data else {})

    def engine_times(self, videos: Sequence[Media]) -> dict[str, Any]:
        """The videos' times as vLLM takes them."""
        seconds = [item.seconds_per_temporal_patch for item in videos]
        return {"second_per_grid_ts": torch.tensor(seconds, dtype=torch.float64)}

    def _compact(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens with one placeholder per media item."""
        ids = prompt.input_ids.tolist()
        kept: list[int] = []
        start = 0
        for item in prompt.media:
            token = self.media_token_ids()[item.kind]
            expanded = self.placeholder_ids(item)
            first = ids.index(token, start) - expanded.index(token)
            kept += [*ids[start:first], token]
            start = first + len(expanded)
        return kept + ids[start:]


def structure_of(config: Any) -> dict[str, Any]:
    """The fields of an encoder's config but for the name it was read from and its precision."""
    return {key: value for key, value in config.to_dict().items() if key not in ("dtype", "_name_or_path")}
