r"""VILA, NVILA and LongVILA (arXiv:2312.07533, 2412.04468, 2408.10188): SigLIP frames between text tokens of a Qwen2.

A video is its frames one after the other, each the encoder's square image and then "\n"; LongVILA-R1 averages
neighbouring frames first. Such text between frames is text: it stands in the prompt as token ids and is looked up from
the current weights, and features are the encoder's rows alone. Positions count tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.models.base import CausalFamily
from longrl.models.building import OWN_WEIGHTS
from longrl.models.patching import GridTHW
from longrl.models.planning_sizes import TextSizes, VisionSizes
from longrl.models.vila_config import Encoder, PoolFrames, VilaConfig, template_file
from longrl.models.vila_model import VilaModel, local_folder
from longrl.models.vila_tiles import resize_frames, tile_grid, with_scales, with_thumbnail
from longrl.types import AudioClip, Frames, Media, MediaKind, Prompt, TemporalPatchSize

MEDIA_TOKENS = {"image": "<image>", "video": "<vila/video>"}
EXTRA_TOKENS = ("<vila/sentinel>", *MEDIA_TOKENS.values())
"""Tokens that the released code adds to a tokenizer that lacks them, in this order."""


class VilaFamily(CausalFamily):
    """A model in VILA's released layout, with SigLIP and Qwen2.

    Args:
        model: folder or hub id; its own code is never run.
        freeze_vision_encoder: leave the vision encoder as it is.
        freeze_projector: leave the projector as it is. With both frozen, as LongVILA-R1 did in RL, each video is
            encoded once per step, without gradient.
        pool_frames: neighbouring frames of a video that are averaged into one; "by_length" as LongVILA-R1's code
            chooses them: 4 in a video of up to 256 frames, 8 up to 512, 16 up to 1024, and then 32. None is what the
            model's config says.
        max_frames_per_encode: frames or tiles the encoder reads in one call, which bounds its memory.
        kwargs: see `CausalFamily`.

    Example:
        `VilaFamily(model="Efficient-Large-Model/LongVILA-R1-7B", dtype="bfloat16", pool_frames="by_length")`
    """

    text_part = "llm"
    answer_options = ("pool_frames", "max_frames_per_encode")  # the encoder rounds by the size of a call
    training_options = ("freeze_vision_encoder", "freeze_projector")

    def __init__(
        self,
        model: str,
        freeze_vision_encoder: bool = True,
        freeze_projector: bool = True,
        pool_frames: PoolFrames = None,
        max_frames_per_encode: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if max_frames_per_encode < 1 or (isinstance(pool_frames, int) and pool_frames < 1):
            raise ValueError(
                "model.family's pool_frames and max_frames_per_encode must be at least 1, got "
                f"{pool_frames} and {max_frames_per_encode}"
            )
        self.freeze_vision_encoder = freeze_vision_encoder
        self.freeze_projector = freeze_projector
        self.pool_frames = pool_frames
        self.max_frames_per_encode = max_frames_per_encode

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def auto_class(self) -> Any:
        return VilaModel

    @override
    def load_weights(self, source: str, **options: Any) -> VilaModel:
        return VilaModel.from_pretrained(source, **options)

    @override
    def attn_implementation(self) -> dict[str, str]:
        return {"llm": str(super().attn_implementation()), "vision_tower": "sdpa"}

    @override
    def read_config(self, source: str | Path) -> VilaConfig:
        return VilaConfig(local_folder(source), self.pool_frames)

    @override
    def text_folder(self) -> str:
        """The language model's, for vLLM knows no VILA."""
        return str(local_folder(self._existing_path()) / self.text_part)

    @override
    def read_tokenizer(self) -> Any:
        """The language model's, with VILA's own tokens."""
        tokenizer = super().read_tokenizer()
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in EXTRA_TOKENS if token not in known], special_tokens=True)
        tokenizer.chat_template = self.config.chat_template or tokenizer.chat_template
        return tokenizer

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        model = super().build(weights)
        model.vision_tower.requires_grad_(not self.freeze_vision_encoder)
        model.mm_projector.requires_grad_(not self.freeze_projector)
        return model

    @override
    def backbone(self, model: Any) -> Any:
        return model.llm.model

    @override
    def media_encoders(self, model: Any) -> tuple[nn.Module, ...]:
        return (model.visual,)

    @override
    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        return (model.mm_projector,)

    @override
    def encoder_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "preprocessor": config.preprocessor,
            "aspect": config.aspect,
            "size": config.size,
            "scales": config.scales,
            "tiles": config.tile_range,
            "pool": (config.video.frames.fewest, *config.video.pool),
            "pool_doubled_beyond": config.video.frames.doubled_beyond,
        }

    @override
    def save_processing(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(Path(folder) / "llm")
        file = Path(folder) / "vision_tower" / "preprocessor_config.json"
        file.write_text(json.dumps(self.config.preprocessor, indent=2) + "\n")
        if self.config.chat_template:
            (Path(folder) / str(template_file(self.config.values))).write_text(self.tokenizer.chat_template)

    # -- pixels --------------------------------------------------------------------------------------------------

    @override
    def patch_all(self, frames: Sequence[Frames | AudioClip]) -> list[Media]:
        """Cuts an image into tiles if it is the only one, as the released code does."""
        images = [item for item in frames if isinstance(item, Frames) and item.kind == "image"]
        if len(images) != 1 or self.config.aspect not in ("dynamic", "dynamic_s2"):
            return super().patch_all(frames)
        return [self._tiled(images[0]) if item is images[0] else self.patch(item) for item in frames]

    @override
    def resize(self, frames: Frames) -> Frames:
        if frames.resized or not len(frames.pixels):
            return frames
        return replace(frames, pixels=resize_frames(frames.pixels, self.config.size, self.config.size), resized=True)

    @override
    def temporal_patches_per_encode(self, media: Media) -> int:
        return max(1, self.max_frames_per_encode // media.temporal_patch_size)

    @override
    def grid(
        self, num_frames: int, height: int, width: int, *, kind: MediaKind = "video", resized: bool = False
    ) -> GridTHW:
        """A frame of any size is one square of the encoder; those that are pooled into one lie one below the other."""
        pool = self.config.video.frames.of(num_frames) if kind == "video" else 1
        side = self.config.patches_per_side
        return -(-num_frames // pool), pool * side, side

    @override
    def outline_media(self, frames: Any) -> Media:
        return self._with_grid(super().outline_media(frames), frames)

    def _with_grid(self, media: Media, frames: Frames, tiles: tuple[int, int] | None = None) -> Media:
        """The item under the key of its squares, of which an image may have more than one."""
        rows, columns = tiles or self._tiles(media.grid_thw)
        side = self.config.patches_per_side
        grid = (media.grid_thw[0], rows * side, columns * side)
        return replace(media, grid_thw=grid, key=f"{frames.key}-{self.config.size}-{rows}x{columns}")

    @override
    def pixel_patches(self, frames: Frames) -> Tensor:
        """Whole frames, resized to the encoder's square; an incomplete temporal patch may lack some."""
        return self.resize(frames).pixels.flatten(1)

    def _tiled(self, frames: Frames) -> Media:
        """One image as tiles: `image_aspect_ratio` dynamic or dynamic_s2."""
        height, width = frames.pixels.shape[-2:]
        size, scales = self.config.size, self.config.scales
        min_tiles, max_tiles = self.config.tile_range
        rows, columns = tile_grid(height, width, size, min_tiles=min_tiles, max_tiles=max_tiles)
        media = self._with_grid(self.outline_media(frames), frames, (rows, columns))
        if not len(frames.pixels):  # another rank has it
            return media
        grid = (frames.pixels, rows, columns, size)
        tiles = with_scales(*grid, scales) if scales else with_thumbnail(*grid)
        return replace(media, patches=tiles.flatten(1))

    @property
    @override
    def temporal_patch_size(self) -> TemporalPatchSize:
        return self.config.video.frames

    def _tiles(self, grid: GridTHW) -> tuple[int, int]:
        """Rows and columns of squares of the encoder in a temporal patch; (1, 1) for an image that is not cut."""
        side = self.config.patches_per_side
        return grid[1] // side, grid[2] // side

    def _by_scales(self, media: Media) -> bool:
        """True for an image whose tiles are joined before the projector."""
        return media.kind == "image" and bool(self.config.scales) and self._tiles(media.grid_thw) != (1, 1)

    # -- prompts -------------------------------------------------------------------------------------------------

    @override
    def media_token_ids(self) -> dict[str, int]:
        return {kind: self.tokenizer.convert_tokens_to_ids(token) for kind, token in MEDIA_TOKENS.items()}

    @override
    def chat_content(self, content: list[dict[str, str]]) -> str:
        r"""One text; behind each tile of a lone image "\n" follows, and `placeholder_ids` has those between tiles."""
        lone = sum(part["type"] == "image" for part in content) == 1 and self.config.aspect == "dynamic"
        marks = MEDIA_TOKENS | {"image": MEDIA_TOKENS["image"] + "\n" * lone}
        return "".join(part["text"] if part["type"] == "text" else marks[part["type"]] for part in content).strip()

    @override
    def placeholder_ids(self, media: Media) -> list[int]:
        token = self.media_token_ids()[media.kind]
        if media.kind == "video":
            encoder = self.config.video
            frame = self._framed(encoder, [token] * self.config.tokens_per_frame)
            return frame * media.grid_thw[0] + self._text_ids(encoder.sep_tokens)
        num_tiles = 1 if self._by_scales(media) else self._num_tiles(media)
        tile = self._framed(self.config.image, [token] * (self.num_features(media) // num_tiles))
        return tile + [*self._text_ids("\n"), *tile] * (num_tiles - 1)

    def _framed(self, encoder: Encoder, rows: list[int]) -> list[int]:
        return [*self._text_ids(encoder.start_tokens), *rows, *self._text_ids(encoder.end_tokens)]

    def _text_ids(self, text: str | None) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _num_tiles(self, media: Media) -> int:
        """Tiles of `image_aspect_ratio: dynamic`, thumbnail included."""
        count = math.prod(self._tiles(media.grid_thw))
        return count + (count > 1)

    @override
    def num_features(self, media: Media) -> int:
        """Rows of the encoder; the text between frames or tiles is not among them."""
        config = self.config
        if media.kind == "video":
            return media.grid_thw[0] * config.tokens_per_frame
        if not self._by_scales(media):
            return self._num_tiles(media) * config.projected_side**2
        grids = [(scale // config.scales[0],) * 2 for scale in config.scales[:-1]]
        rows, columns = [*grids, self._tiles(media.grid_thw)][config.output_scale]
        return rows * columns * config.projected_side**2

    # -- features ------------------------------------------------------------------------------------------------

    @override
    def encode_media(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] features of each media item. A frame or tile is encoded on its own, whatever else is in the call."""
        size = self.config.size
        device = next(model.visual.parameters()).device  # the text stack's shards may be in host memory
        features = []
        for item in media:
            pixels = item.patches.view(-1, 3, size, size)
            if self._by_scales(item):
                pixels = pixels.to(device, non_blocking=True)
                features.append(model.visual(pixels, self._tiles(item.grid_thw))[0])
                continue
            calls = pixels.split(self.max_frames_per_encode)
            frames = torch.cat([model.visual(call.to(device, non_blocking=True)) for call in calls])
            if item.kind == "video":
                frames = average_frames(frames, item.grid_thw[0], (item.temporal_patch_size, *self.config.video.pool))
            features.append(frames.flatten(0, 1))
        return features

    @override
    def planning_sizes(self) -> tuple[TextSizes, VisionSizes | None]:
        """Every layer of the encoder attends within one frame."""
        vision = self.config.vision_encoder
        patches_per_frame = self.config.patches_per_side**2
        encoder = VisionSizes(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_full_layers=0,
            window_patches=patches_per_frame,
            patch_values=vision.num_channels * vision.patch_size**2,
            merge=patches_per_frame / self.config.tokens_per_frame,
        )
        return super().planning_sizes()[0], encoder

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        return {"enable_prompt_embeds": True}

    @override
    def engine_weight(self, name: str) -> str | None:
        return name.removeprefix("llm.") if name.startswith("llm.") else None

    @override
    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        return self._request_with_embeddings(prompt, features)


def average_frames(frames: Tensor, num_pooled: int, pool: tuple[int, int, int]) -> Tensor:
    """Means over neighbours: `TSPVideoEncoder` of NVlabs/VILA.

    Args:
        frames: [F, side * side, D].
        num_pooled: T, the number of pooled frames; the last frame fills an incomplete one.
        pool: neighbours in time, height and width.

    Returns:
        [T, N, D].
    """
    time, height, width = pool
    missing = num_pooled * time - len(frames)
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1)])
    side = round(frames.shape[1] ** 0.5)
    split = frames.view(num_pooled, time, side // height, height, side // width, width, -1)
    return split.mean((1, 3, 5)).flatten(1, 2)
