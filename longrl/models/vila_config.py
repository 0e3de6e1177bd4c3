"""The folder of a VILA model as released: a config over three parts, each a folder of its own.

    config.json        how pixels are cut and frames encoded; `llm_cfg`, `vision_tower_cfg`, `mm_projector_cfg`
    llm/               an ordinary Qwen2 folder with the tokenizer
    vision_tower/      an ordinary SigLIP folder with preprocessor_config.json
    mm_projector/      config.json with `mm_projector_type`, model.safetensors

Field names and their meaning: NVlabs/VILA, llava/model/configuration_llava.py and llava_arch.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longrl.models.text import TextFamily
from longrl.types import TemporalPatchSize

PARTS = ("llm", "vision_tower", "mm_projector")
DOWNSAMPLING = {
    "linear": 1, "mlp2x_gelu": 1, "mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3,
}  # fmt: skip
"""Projector kind -> patches along one side of the square that becomes a token."""
ASPECTS = (None, "resize", "dynamic", "dynamic_s2")
"""Of `image_aspect_ratio`. None leaves resizing to the processor of the encoder, which is the same for SigLIP."""


PoolFrames = int | Literal["by_length"] | None
BY_LENGTH = TemporalPatchSize(4, (256, 512, 1024))
"""LongVILA-R1: the code released with it (modeling_vila.py) sets the size of its TSPVideoEncoder for every video anew:
4 times the number of frames over 256, which is rounded up to 1, 2, 4 or 8. What its config.json says is not used."""
ONE_FRAME = TemporalPatchSize()


@dataclass(frozen=True)
class Encoder:
    """Text around the features of a frame, and how frames become one: `image_encoder` and `video_encoder`."""

    start_tokens: str | None = None
    """Before a frame."""
    end_tokens: str | None = "\n"
    """Behind a frame."""
    sep_tokens: str | None = None
    """Behind a whole video."""
    frames: TemporalPatchSize = ONE_FRAME
    """Neighbours in time whose features are averaged."""
    pool: tuple[int, int] = (1, 1)
    """Neighbours in height and width whose features are averaged."""

    @classmethod
    def read(cls, found: str | dict[str, Any] | None) -> Encoder:
        """From what a config holds: nothing, a dictionary, or one as text."""
        values = dict(json.loads(found) if isinstance(found, str) else found or {})
        values = {name: None if value == "None" else value for name, value in values.items()}
        kind = values.pop("_target_", "BasicVideoEncoder").rpartition(".")[2]
        pools = values.pop("pool_sizes", None)
        known = {"start_tokens", "end_tokens", "sep_tokens"}
        if kind not in ("BasicImageEncoder", "BasicVideoEncoder", "TSPVideoEncoder") or values.keys() - known:
            raise ValueError(
                f"an encoder must be BasicImageEncoder, BasicVideoEncoder or TSPVideoEncoder with {sorted(known)} and "
                f"pool_sizes, got {found}; use a model whose config.json has such image_encoder and video_encoder"
            )
        if pools is None:
            return cls(**values, frames=BY_LENGTH if kind == "TSPVideoEncoder" else ONE_FRAME)
        if len(pools) != 1:
            raise ValueError(
                f"pool_sizes of video_encoder must hold one size, for ranks share a video by its pooled frames, got "
                f"{pools}; keep one of them in the model's config.json"
            )
        time, height, width = pools[0]
        return cls(**values, frames=TemporalPatchSize(time), pool=(height, width))


@dataclass(frozen=True)
class VilaConfig:
    """What a VILA folder says.

    Example:
        `VilaConfig.read("models/NVILA-Lite-8B").tokens_per_frame` is 121.
    """

    values: dict[str, Any]
    """The top `config.json`."""
    llm: Any
    """Config of the language model."""
    vision_encoder: Any
    """Config of the vision encoder."""
    projector: str
    """Kind of the projector."""
    preprocessor: dict[str, Any]
    """Of the encoder."""
    chat_template: str | None = None
    """Instead of the tokenizer's own."""
    pool_frames: PoolFrames = None
    """Instead of the config's own."""

    @classmethod
    def read(cls, folder: str | Path) -> VilaConfig:
        """Reads a folder; a part without a `config.json` of its own is described by the top one.

        Raises:
            ValueError: a part is missing, or something is not supported.
        """
        from transformers import CONFIG_MAPPING

        folder = Path(folder)
        values = json.loads((folder / "config.json").read_text())
        llm, vision_encoder, projector = (_part(folder, values, name) for name in PARTS)
        found = [llm.get("model_type"), vision_encoder.get("model_type"), projector.get("mm_projector_type")]
        allowed = [TextFamily.model_types, ("siglip_vision_model",), tuple(DOWNSAMPLING)]
        for name, got, choice in zip(PARTS, found, allowed, strict=True):
            if got not in choice:
                raise ValueError(f"{folder}: {name} must be {' or '.join(choice)}, got {got!r}; use another VILA model")
        file = folder / "vision_tower" / "preprocessor_config.json"
        config = cls(
            values,
            CONFIG_MAPPING[llm["model_type"]].from_dict(llm),
            CONFIG_MAPPING[vision_encoder["model_type"]].from_dict(vision_encoder),
            projector["mm_projector_type"],
            json.loads(file.read_text()) if file.is_file() else {},
            _chat_template(folder, values),
        )
        config._check(folder)
        return config

    def _check(self, folder: Path) -> None:
        rules = {
            "image_aspect_ratio": (self.aspect, ASPECTS),
            "mm_vision_select_feature": (self.values.get("mm_vision_select_feature"), ("cls_patch",)),
            "s2": (bool(self.values.get("s2")), (False,)),
            "ps3": (bool(self.values.get("ps3")), (False,)),
            "video_max_tiles": (self.values.get("video_max_tiles") or 1, (1,)),
        }
        for name, (got, allowed) in rules.items():
            if got not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, allowed))} in {folder}/config.json, got {got!r}; use a "
                    "model of the NVILA or LongVILA-R1 kind"
                )
        side = self.projected_side
        height, width = self.video.pool
        if side % height or side % width:
            raise ValueError(
                f"pool_sizes={[self.video.frames.fewest, height, width]} of video_encoder must divide the "
                f"{side} x {side} features of a frame; correct {folder}/config.json"
            )

    def with_pool(self, frames: PoolFrames) -> VilaConfig:
        """The same model, whose videos pool so many frames."""
        return replace(self, pool_frames=frames)

    # -- the encoder -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Pixels along the encoder's square image."""
        return self.vision_encoder.image_size

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of it."""
        return self.size // self.vision_encoder.patch_size

    @property
    def select_layer(self) -> int:
        """Index among the encoder's hidden states, embeddings first."""
        return self.values.get("mm_vision_select_layer") or -2

    @property
    def projected_side(self) -> int:
        """Tokens along one side of a frame or tile behind the projector, which pads with zeros."""
        return math.ceil(self.patches_per_side / DOWNSAMPLING[self.projector])

    @property
    def scales(self) -> list[int]:
        """Pixel sizes whose features are put side by side; empty without dynamic S2."""
        if not self.values.get("dynamic_s2"):
            return []
        scales = self.values["s2_scales"]
        return sorted(map(int, scales.split(",") if isinstance(scales, str) else scales))

    @property
    def output_scale(self) -> int:
        """Index of the scale on whose grid the features of an image lie."""
        return self.values.get("s2_resize_output_to_scale_idx") or 0

    @property
    def projector_input(self) -> int:
        """Width of what the projector reads of a patch."""
        return self.vision_encoder.hidden_size * max(1, len(self.scales))

    # -- prompts -------------------------------------------------------------------------------------------------

    @property
    def aspect(self) -> str | None:
        """How a lone image is cut."""
        return self.values.get("image_aspect_ratio")

    @property
    def tile_range(self) -> tuple[int, int]:
        """Fewest and most tiles of an image; of dynamic S2 those of the largest scale."""
        fewest, most = self.values.get("min_tiles") or 1, self.values.get("max_tiles") or 12
        return ((self.scales[-1] // self.scales[0]) ** 2 if self.scales else fewest), most

    @property
    def image(self) -> Encoder:
        """How an image or tile is encoded."""
        return Encoder.read(self.values.get("image_encoder"))

    @property
    def video(self) -> Encoder:
        """How a video is encoded."""
        encoder = Encoder.read(self.values.get("video_encoder"))
        if self.pool_frames is None:
            return encoder
        frames = BY_LENGTH if self.pool_frames == "by_length" else TemporalPatchSize(self.pool_frames)
        return replace(encoder, frames=frames)

    @property
    def tokens_per_frame(self) -> int:
        """Features of one frame of a video, or of the frames pooled into one."""
        height, width = self.video.pool
        return self.projected_side**2 // (height * width)

    def get_text_config(self) -> Any:
        """The language model's, as transformers' configs give theirs."""
        return self.llm


def template_file(values: dict[str, Any]) -> str | None:
    """Name of the file with the chat template, if the top config asks for one of its own."""
    return f"{values['chat_template']}.jinja" if values.get("chat_template") else None


def _chat_template(folder: Path, values: dict[str, Any]) -> str | None:
    name = template_file(values)
    if name is None:
        return None
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder}/config.json has chat_template {values['chat_template']!r}, but {folder}/{name} does not exist; "
            "put the template there, or set chat_template to null for the tokenizer's own"
        )
    # Indentation and line ends of the file are for readers, as in the released code.
    return (folder / name).read_text().replace("    ", "").replace("\n", "")


def _part(folder: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of a part: its own file, or what the top config holds."""
    file = folder / name / "config.json"
    found = json.loads(file.read_text()) if file.is_file() else values.get(f"{name}_cfg")
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder} is no VILA folder: neither {name}/config.json nor {name}_cfg in config.json describes its "
            f"{name}; give a folder or hub id with {', '.join(PARTS)}, such as Efficient-Large-Model/NVILA-Lite-8B"
        )
    return found
