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
"""Those of `image_aspect_ratio`. None leaves resizing to the processor of the encoder, which is the same for SigLIP."""


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
    """Behind a video."""
    frames: TemporalPatchSize = ONE_FRAME
    """Neighbours in time whose features are averaged."""
    pool: tuple[int, int] = (1, 1)
    """Neighbours in height and width whose features are averaged."""

    @classmethod
    def read(cls, saved: str | dict[str, Any] | None) -> Encoder:
        """Reads what a config holds: nothing, a dictionary, or one as text."""
        values = dict(json.loads(saved) if isinstance(saved, str) else saved or {})
        values = {name: None if value == "None" else value for name, value in values.items()}
        kind = values.pop("_target_", "BasicVideoEncoder").rpartition(".")[2]
        pools = values.pop("pool_sizes", None)
        known = {"start_tokens", "end_tokens", "sep_tokens"}
        if kind not in ("BasicImageEncoder", "BasicVideoEncoder", "TSPVideoEncoder") or values.keys() - known:
            raise ValueError(
                f"an encoder must be BasicImageEncoder, BasicVideoEncoder or TSPVideoEncoder with {sorted(known)} and "
                f"pool_sizes, got {saved}; use a model whose config.json has such image_encoder and video_encoder"
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


class VilaConfig:
    """A VILA folder's description; a part without a `config.json` of its own is described by the top one.

    Args:
        folder: in the released layout.
        pool_frames: neighbouring frames of a video that are averaged; None is what the folder says.

    Raises:
        ValueError: a part is missing, or something is not supported.

    Example:
        `VilaConfig("models/NVILA-Lite-8B").tokens_per_frame` is 121.
    """

    def __init__(self, folder: str | Path, pool_frames: PoolFrames = None) -> None:
        from transformers import CONFIG_MAPPING

        # 1. The top config and the parts.
        folder = Path(folder)
        values = json.loads((folder / "config.json").read_text())
        llm, vision_encoder, projector = (_part(folder, values, name) for name in PARTS)
        kinds = [llm.get("model_type"), vision_encoder.get("model_type"), projector.get("mm_projector_type")]
        allowed = [TextFamily.model_types, ("siglip_vision_model",), tuple(DOWNSAMPLING)]
        for name, got, choice in zip(PARTS, kinds, allowed, strict=True):
            if got not in choice:
                raise ValueError(f"{folder}: {name} must be {' or '.join(choice)}, got {got!r}; use another VILA model")
        self.values: dict[str, Any] = values
        self.llm: Any = CONFIG_MAPPING[llm["model_type"]].from_dict(llm)
        self.vision_encoder: Any = CONFIG_MAPPING[vision_encoder["model_type"]].from_dict(vision_encoder)
        self.projector: str = projector["mm_projector_type"]
        file = folder / "vision_tower" / "preprocessor_config.json"
        self.preprocessor: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self.chat_template = _chat_template(folder, values)
        """Instead of the tokenizer's; None leaves that."""

        # 2. The encoder.
        self.size: int = self.vision_encoder.image_size
        """Pixels along its square image."""
        self.patches_per_side = self.size // self.vision_encoder.patch_size
        self.select_layer: int = values.get("mm_vision_select_layer") or -2
        """Index among its hidden states, embeddings first."""
        self.projected_side = math.ceil(self.patches_per_side / DOWNSAMPLING[self.projector])
        """Tokens along one side of a frame or tile behind the projector, which pads with zeros."""

        # 3. Tiles of a lone image, and scales whose features are put side by side.
        self.aspect: str | None = values.get("image_aspect_ratio")
        """How a lone image is cut."""
        scales = values["s2_scales"] if values.get("dynamic_s2") else []
        self.scales = sorted(map(int, scales.split(",") if isinstance(scales, str) else scales))
        """In pixels; empty without dynamic S2."""
        self.output_scale: int = values.get("s2_resize_output_to_scale_idx") or 0
        """Index of the scale on whose grid the features of an image lie."""
        min_tiles = (self.scales[-1] // self.scales[0]) ** 2 if self.scales else values.get("min_tiles") or 1
        self.tile_range: tuple[int, int] = (min_tiles, values.get("max_tiles") or 12)
        """Fewest and most tiles of an image; of dynamic S2 those of the largest scale."""
        self.projector_input: int = self.vision_encoder.hidden_size * max(1, len(self.scales))
        """Width of what the projector reads of a patch."""

        # 4. Text around frames and tiles, and how frames become one.
        self.image = Encoder.read(values.get("image_encoder"))
        self.video = Encoder.read(values.get("video_encoder"))
        self._check(folder)
        if pool_frames is not None:
            frames = BY_LENGTH if pool_frames == "by_length" else TemporalPatchSize(pool_frames)
            self.video = replace(self.video, frames=frames)
        height, width = self.video.pool
        self.tokens_per_frame = self.projected_side**2 // (height * width)
        """Features of one frame of a video, or of the frames pooled into one."""

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
    config = json.loads(file.read_text()) if file.is_file() else values.get(f"{name}_cfg")
    if not isinstance(config, dict):
        raise ValueError(
            f"{folder} is no VILA folder: neither {name}/config.json nor {name}_cfg in config.json describes its "
            f"{name}; give a folder or hub id with {', '.join(PARTS)}, such as Efficient-Large-Model/NVILA-Lite-8B"
        )
    return config
