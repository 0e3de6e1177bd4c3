r"""InternVL3.5 and InternVL3 (arXiv:2508.18265, 2504.10479): square tiles of images between tokens of Qwen3 or Qwen2.5.

An image is cut into tiles of the encoder's size, as many as fit its aspect ratio, with all of it behind them as a
thumbnail; a frame of a video is one tile. Pixel shuffle joins 2 x 2 patches of a tile, and a projector leads to the
width of the text stack. A video is its frames in words, `Frame1: <img>...</img>\nFrame2: ...`. Positions count tokens.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.weight_folder import read_json_object
from longrl.models.building import OWN_WEIGHTS
from longrl.models.expert_routing import num_experts
from longrl.models.patching import GridTHW
from longrl.models.planning_sizes import TextSizes, VisionSizes
from longrl.models.processor_family import ProcessorFamily
from longrl.models.qwen_vl import structure_of
from longrl.types import Frames, Media, MediaKind, Prompt, UnusableSample

logger = logging.getLogger(__name__)


class InternVLFamily(ProcessorFamily):
    """InternVL3.5 or InternVL3 of any size, in the layout that transformers reads: the folders that end in -HF.

    Args:
        model: folder or hub id.
        max_tiles: tiles that an image is cut into, beside its thumbnail; 1 leaves every image one tile.
        freeze_vision_encoder: leave the vision encoder as it is.
        freeze_projector: leave the projector as it is. With both frozen, media are encoded once per step, without
            gradient.
        max_tiles_per_encode: tiles or frames the encoder reads in one call, which bounds its memory.
        kwargs: see `CausalFamily`.

    Example:
        `InternVLFamily(model="OpenGVLab/InternVL3_5-8B-HF", dtype="bfloat16")`
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    """`model_type` of the configs it reads."""
    answer_options: ClassVar[tuple[str, ...]] = ("max_tiles", "max_tiles_per_encode")  # rounds by the size of a call
    training_options: ClassVar[tuple[str, ...]] = ("freeze_vision_encoder", "freeze_projector")

    def __init__(
        self,
        model: str,
        max_tiles: int = 12,
        freeze_vision_encoder: bool = True,
        freeze_projector: bool = True,
        max_tiles_per_encode: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_ranges(locals(), "model.family.init_args.", max_tiles=COUNT, max_tiles_per_encode=COUNT)
        self.max_tiles = max_tiles
        self.freeze_vision_encoder = freeze_vision_encoder
        self.freeze_projector = freeze_projector
        self.max_tiles_per_encode = max_tiles_per_encode

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def read_config(self, source: str | Path) -> Any:
        """The config of a folder or hub id.

        Raises:
            ValueError: it is in the layout of InternVL's own code, which transformers does not read, or asks for
                features of another layer than released models.
        """
        from transformers import PreTrainedConfig

        file = Path(source, "config.json")
        values = read_json_object(file) if file.is_file() else PreTrainedConfig.get_config_dict(source)[0]
        if values.get("model_type") == "internvl_chat":
            raise ValueError(
                f"{str(source)!r} is in the layout of InternVL's own code (internvl_chat), which is never run here; "
                "name the same model in transformers' layout, e.g. OpenGVLab/InternVL3_5-8B-HF instead of "
                "OpenGVLab/InternVL3_5-8B"
            )
        config = super().read_config(source)
        features = (config.vision_feature_layer, config.vision_feature_select_strategy)
        if features != (-1, "default"):
            raise ValueError(
                f"the config of {str(source)!r} asks for vision_feature_layer and vision_feature_select_strategy "
                f"{features}, and InternVLFamily reads the last layer's patches as all released models do; set them to "
                "-1 and default, or write a family"
            )
        # Released configs say it of the text model alone; transformers' default would tie an LM head of its own.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings
        return config

    @override
    def attn_implementation(self) -> dict[str, str]:
        return {"text_config": str(super().attn_implementation()), "vision_config": "sdpa"}

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        model = super().build(weights)
        encoder, projector = self.media_encoders(model)
        encoder.requires_grad_(not self.freeze_vision_encoder)
        projector.requires_grad_(not self.freeze_projector)
        text = self.config.get_text_config()
        if text.rope_parameters.get("rope_type") == "dynamic":  # InternVL3's
            logger.warning(
                "rotary embeddings of %s change beyond %d positions with the longest sequence of a micro-batch; keep "
                "data.max_prompt_tokens and rollout.sampling.max_completion_tokens together below that",
                self.model_path, text.max_position_embeddings,
            )  # fmt: skip
        return model

    @override
    def media_encoders(self, model: Any) -> tuple[nn.Module, ...]:
        return model.model.vision_tower, model.model.multi_modal_projector

    @override
    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        return (model.model.multi_modal_projector,)

    # -- pixels --------------------------------------------------------------------------------------------------

    @property
    def _tile_grid(self) -> tuple[int, int]:
        """Patches of a tile along height and width."""
        vision = self.config.vision_config
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        return height // patch_height, width // patch_width

    @override
    def temporal_patches_per_encode(self, media: Media) -> int:
        return self.max_tiles_per_encode

    @override
    def grid(
        self, num_frames: int, height: int, width: int, *, kind: MediaKind = "video", resized: bool = False
    ) -> GridTHW:
        """A frame of any size is one tile; those of an image lie side by side, its thumbnail is not among them."""
        rows, columns = self._tiles(height, width) if kind == "image" else (1, 1)
        tile_rows, tile_columns = self._tile_grid
        return num_frames, rows * tile_rows, columns * tile_columns

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that an image of so many pixels is cut into."""
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        processor = self.processor.image_processor
        least = min(processor.min_patches, self.max_tiles)
        tile = (processor.size["height"], processor.size["width"])
        columns, rows = get_optimal_tiled_canvas((height, width), tile, least, self.max_tiles)
        return rows, columns

    @override
    def resize(self, frames: Frames) -> Frames:
        if frames.kind == "image" or frames.resized:
            return frames
        from transformers.image_utils import SizeDict

        processor = self.processor.video_processor
        size = SizeDict(height=processor.size["height"], width=processor.size["width"])
        pixels = processor.resize(frames.pixels, size=size, resample=processor.resample)
        return replace(frames, pixels=pixels, resized=True)

    @override
    def pixel_patches(self, frames: Frames) -> Tensor:
        """[tiles, values of a tile]; of an image, its thumbnail is the last."""
        if frames.kind == "image":
            processor = self.processor.image_processor
            least = min(processor.min_patches, self.max_tiles)
            result = processor(
                list(frames.pixels), crop_to_patches=True, min_patches=least, max_patches=self.max_tiles,
                return_tensors="pt",
            )  # fmt: skip
            return result["pixel_values"].flatten(1)
        result = self.processor.video_processor(
            [self.resize(frames).pixels], do_resize=False, do_sample_frames=False, return_tensors="pt"
        )
        return result["pixel_values_videos"][0].flatten(1)

    # -- prompts -------------------------------------------------------------------------------------------------

    @override
    def media_token_ids(self) -> dict[str, int]:
        """One token for either kind: a video is its frames, and a frame an image."""
        return dict.fromkeys(("image", "video"), self.config.image_token_id)

    @override
    def media_pieces(self, media: Media) -> list[Media]:
        return [media] if media.kind == "image" else [media.part(1)] * media.grid_thw[0]

    @override
    def media_text(self, chat: str, media: Sequence[Media]) -> str:
        processor = self.processor
        marks = {"image": processor.image_token, "video": processor.video_token}
        found = re.compile("|".join(map(re.escape, marks.values())))
        if found.findall(chat) != [marks[item.kind] for item in media]:
            raise UnusableSample(
                None,
                f"the chat template must write {marks['image']} for each image and {marks['video']} for each video, in "
                f"their order, but wrote {found.findall(chat)} for {[item.kind for item in media]}",
            )
        image = f"{processor.start_image_token}{processor.image_token}{processor.end_image_token}"
        words: list[str] = []
        for item in media:
            shown = [image] if item.kind == "image" else [f"Frame{n + 1}: {image}" for n in range(item.grid_thw[0])]
            words.append("\n".join(shown))
        in_order = iter(words)
        return found.sub(lambda _: next(in_order), chat)

    @override
    def num_features(self, media: Media) -> int:
        rows, columns = self._tile_grid
        num_tiles = math.prod(media.grid_thw) // (rows * columns)
        if media.kind == "image" and num_tiles > 1:
            num_tiles += 1  # the thumbnail
        return num_tiles * int(rows * columns * self.config.downsample_ratio**2)

    @override
    def time_tokens(self, timestamps: Sequence[float]) -> int:
        """Number by Qwen's tokenizer: `Frame`, every digit, `:`, a space, two marks; between frames a line end."""
        return sum(len(str(n + 1)) + 6 for n in range(len(timestamps))) - 1

    # -- features ------------------------------------------------------------------------------------------------

    @override
    def encoder_settings(self) -> dict[str, Any]:
        return {
            "image_processor": self.processor.image_processor.to_dict(),
            "video_processor": self.processor.video_processor.to_dict(),
            "max_tiles": self.max_tiles,
            "vision_config": structure_of(self.config.vision_config),
            "downsample_ratio": self.config.downsample_ratio,
            "projector_hidden_act": self.config.projector_hidden_act,
        }

    @override
    def encode_media(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] features of each media item. A tile is encoded on its own, whatever else is in the call."""
        encoder, projector = self.media_encoders(model)
        weight = next(encoder.parameters())
        size = self.config.vision_config.image_size
        joined = []
        for item in media:
            for call in item.patches.unflatten(1, (3, *size)).split(self.max_tiles_per_encode):
                pixels = call.to(weight.device, weight.dtype, non_blocking=True)
                output = encoder(pixel_values=pixels, return_dict=True)
                patches = output.last_hidden_state[:, 1:].unflatten(1, self._tile_grid)  # without the class token
                joined.append(model.model.pixel_shuffle(patches, scale_factor=self.config.downsample_ratio))
        if not joined:
            return []
        if joined[0].requires_grad:
            joined = [torch.cat(joined)]  # the projector runs once, see `media_encoders`
        rows = torch.cat([projector(patches) for patches in joined])
        return [tiles.flatten(0, 2) for tiles in rows.split([len(item.patches) for item in media])]

    @override
    def planning_sizes(self) -> tuple[TextSizes, VisionSizes | None]:
        """Every layer of the encoder attends within one tile."""
        vision = self.config.vision_config
        encoder = VisionSizes(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_full_layers=0,
            window_patches=math.prod(self._tile_grid),
            patch_values=vision.num_channels * math.prod(vision.patch_size),
            merge=self.config.downsample_ratio**-2,
        )
        return super().planning_sizes()[0], encoder

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        experts = num_experts(self)
        if experts:
            raise ValueError(
                "vLLM reads experts one by one, and the trainer holds those of a layer in one tensor: "
                f"{self.model_path!r} has {experts} experts; use engine: longrl.engines.hf.HFEngine"
            )
        # vLLM's own class takes no video's features, and of images none of different sizes together.
        return {"enable_prompt_embeds": True, "hf_overrides": text_model}

    @override
    def engine_weight(self, name: str) -> str | None:
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name if name.startswith("lm_head.") else None

    @override
    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        return self._request_with_embeddings(prompt, features)


def text_model(config: Any) -> Any:
    """The config of the text stack alone, by which vLLM builds it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = getattr(config, "text_config", None)
    if text is None:  # vLLM asks with an empty config first
        return config
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return text
